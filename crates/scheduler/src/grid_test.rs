use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::resources::ResourceVector;

/// Few distinct spots and levels, so that cells and rows hold many hosts.
fn amounts() -> impl Strategy<Value = Amounts> {
    let memory = prop_oneof![Just(0u64), Just(300), Just(4096), Just(20_000)];
    let minor = || prop_oneof![Just(0u64), Just(10), Just(1000), Just(2000)];
    (0u32..4, memory, minor(), minor()).prop_map(|(vcpus, memory_mib, ecu_milli, ebs_mbps)| {
        Amounts::from(&ResourceVector { vcpus, memory_mib, ecu_milli, ebs_mbps, ..ResourceVector::default() })
    })
}

#[derive(Clone, Debug)]
enum Step {
    Set(u32, Amounts, bool),
    Remove(u32),
    Search(Amounts, bool, usize),
}

fn steps() -> impl Strategy<Value = Step> {
    const HOSTS: u32 = 24;
    prop_oneof![
        3 => (0..HOSTS, amounts(), any::<bool>()).prop_map(|(slot, free, in_use)| Step::Set(slot, free, in_use)),
        1 => (0..HOSTS).prop_map(Step::Remove),
        3 => (amounts(), any::<bool>(), 0usize..20)
            .prop_map(|(wanted, descending, start)| Step::Search(wanted, descending, start)),
    ]
}

/// Bitmaps say exactly where hosts are; bounds are not below any host.
fn check(grid: &Grid, hosts: &BTreeMap<u32, (Spot, Levels)>) {
    assert_eq!(grid.len(), hosts.len());
    let mut columns_of: BTreeMap<usize, u128> = BTreeMap::new();
    for (spot, levels) in hosts.values() {
        *columns_of.entry(spot.row()).or_default() |= 1 << spot.column();
        let cell = &grid.cells[grid.cell_of[spot.0 as usize] as usize - 1];
        assert!(grid.rows[spot.row()].bound.may_fit(*levels) && cell.bound.may_fit(*levels));
    }
    for (index, row) in grid.rows.iter().enumerate() {
        let columns = columns_of.get(&index).copied().unwrap_or(0);
        assert_eq!(row.columns, columns, "row {index}");
        assert_eq!(grid.occupied[index / 64] >> (index % 64) & 1 == 1, columns != 0, "row {index}");
    }
}

proptest! {
    #[test]
    fn a_search_shows_every_possible_host_in_order(steps in prop::collection::vec(steps(), 1..100)) {
        let mut grid = Grid::new();
        let mut positions = vec![0; 32];
        let mut hosts: BTreeMap<u32, (Spot, Levels)> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Set(slot, free, in_use) => {
                    let (spot, levels) = (Spot::of(&free, in_use), Levels::of(&free));
                    match hosts.insert(slot, (spot, levels)) {
                        Some((old, _)) if old == spot => grid.update(slot, spot, levels, &positions),
                        old => {
                            if let Some((old, _)) = old {
                                grid.remove(slot, old, &mut positions);
                            }
                            grid.insert(slot, spot, levels, &mut positions);
                        }
                    }
                }
                Step::Remove(slot) => {
                    if let Some((spot, _)) = hosts.remove(&slot) {
                        grid.remove(slot, spot, &mut positions);
                    }
                }
                Step::Search(wanted, descending, start) => {
                    let target = Target::of(&wanted);
                    let mut seen = Vec::new();
                    grid.search(target, descending, |bound| start % bound, |spot, slot| {
                        seen.push((spot, slot));
                        Visit::Continue
                    });
                    let mut order: Vec<Spot> = seen.iter().map(|(spot, _)| *spot).collect();
                    if descending {
                        order.reverse();
                    }
                    prop_assert!(order.is_sorted());
                    seen.sort_by_key(|(_, slot)| *slot);
                    let possible = hosts.iter().filter(|(_, (spot, levels))| {
                        spot.row() % MEMORY_ROWS >= target.row
                            && spot.column() >= target.column
                            && levels.may_fit(target.levels)
                    });
                    prop_assert_eq!(seen, possible.map(|(slot, (spot, _))| (*spot, *slot)).collect::<Vec<_>>());
                }
            }
            check(&grid, &hosts);
        }
    }
}
