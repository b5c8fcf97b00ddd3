//! Why nothing was found: a look at every host, made only after a decision has failed.

use std::collections::BTreeMap;

use crate::no_capacity::{Exclusion, NoCapacity, Shortfall};
use crate::request::Request;
use crate::resources::Resource;
use crate::rules::Rules;
use crate::scheduler::{Key, Scheduler};

impl<H: Key, A: Key> Scheduler<H, A> {
    #[cold]
    pub(crate) fn explain(&self, request: &Request<H>, rules: &Rules) -> NoCapacity {
        let facts = self.engine.facts();
        let mut excluded: BTreeMap<Exclusion, usize> = BTreeMap::new();
        let mut nearest: Option<(f64, u32)> = None;
        let mut fits_when_empty = false;
        let (mut hosts, mut eligible) = (0, 0);
        for (known, slot) in self.known.iter().zip(0u32..) {
            let (Some(known), Some(hot)) = (known, self.engine.hot(slot)) else { continue };
            hosts += 1;
            if let Some(exclusion) = rules.exclusion(&facts, slot) {
                *excluded.entry(exclusion).or_default() += 1;
                continue;
            }
            eligible += 1;
            fits_when_empty |= known.allocatable.fits(&rules.wanted);
            let lack = Resource::ALL
                .into_iter()
                .map(|resource| lack(request.resources.get(resource), hot.free.get(resource)))
                .fold(0.0, f64::max);
            if nearest.is_none_or(|(least, _)| lack < least) {
                nearest = Some((lack, slot));
            }
        }
        let nearest = nearest.map(|(_, slot)| slot);
        NoCapacity {
            nearest_host: nearest.and_then(|slot| self.host_name(slot)).map(|host| host.to_string()),
            shortfalls: nearest.map(|slot| self.shortfalls(request, slot)).unwrap_or_default(),
            hosts,
            eligible,
            excluded: excluded.into_iter().collect(),
            fits_when_empty,
            placeable: 0,
            wanted: 1,
        }
    }

    fn shortfalls(&self, request: &Request<H>, slot: u32) -> Vec<Shortfall> {
        let (Some(hot), Some(Some(known))) = (self.engine.hot(slot), self.known.get(slot as usize)) else {
            return Vec::new();
        };
        let mut found: Vec<Shortfall> = Resource::ALL
            .into_iter()
            .map(|resource| Shortfall {
                resource,
                needed: request.resources.get(resource),
                free: hot.free.get(resource),
                allocatable: known.allocatable.get(resource),
            })
            .filter(|short| short.needed > short.free)
            .collect();
        found.sort_by(|a, b| lack(b.needed, b.free).total_cmp(&lack(a.needed, a.free)));
        found
    }
}

/// Which part of what is needed is not there: 0 = nothing lacks, 1 = all.
fn lack(needed: u64, free: u64) -> f64 {
    if needed == 0 { 0.0 } else { needed.saturating_sub(free) as f64 / needed as f64 }
}
