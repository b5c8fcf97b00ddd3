//! What all list calls have in common: ids and filters that are checked, what is missing among the ids, and the page.

use std::borrow::Cow;

use hearth_proto::v1;
use hearth_types::Filters;
use prost::Message;

use crate::api_error::{ApiError, ApiResult};
use crate::check;
use crate::core::Core;
use crate::paging::Pager;

/// One list call.
pub(crate) struct Listing {
    pager: Pager,
    ids: Vec<String>,
    filters: Filters,
}

impl Listing {
    /// Of everything. `call` and `request` (with its page taken out) say what its page tokens are good for.
    pub fn new(
        core: &Core,
        call: &str,
        account: &str,
        request: &impl Message,
        page: Option<&v1::PageRequest>,
    ) -> ApiResult<Self> {
        let pager = Pager::new(core, call, account, request, page)?;
        Ok(Self { pager, ids: Vec::new(), filters: check::filters(&[], &[])? })
    }

    /// Only of these, if there are any; `check` tells whether one looks like an id.
    pub fn ids(mut self, field: &str, ids: &[String], check: impl Fn(&str) -> ApiResult<()>) -> ApiResult<Self> {
        self.ids = check::optional_ids(field, ids)?;
        self.ids.iter().try_for_each(|id| check(id))?;
        Ok(self)
    }

    /// Only of what matches.
    pub fn filters(mut self, filters: &[v1::Filter], known: &[&str]) -> ApiResult<Self> {
        self.filters = check::filters(filters, known)?;
        Ok(self)
    }

    /// Refuses ids that are not there; `not_found` makes the error.
    pub fn all_known(&self, is_known: impl Fn(&str) -> bool, not_found: impl Fn(&[&str]) -> ApiError) -> ApiResult<()> {
        let missing: Vec<&str> = self.ids.iter().map(String::as_str).filter(|id| !is_known(id)).collect();
        match missing.is_empty() {
            true => Ok(()),
            false => Err(not_found(&missing)),
        }
    }

    /// Whether this id is asked for.
    pub fn names(&self, id: &str) -> bool {
        self.ids.is_empty() || self.ids.iter().any(|named| named == id)
    }

    /// Whether a key of the list lies behind the pages already given.
    pub fn is_ahead(&self, key: &str) -> bool {
        self.pager.wants(key)
    }

    /// Both, of a list whose keys are the ids.
    pub fn wants(&self, id: &str) -> bool {
        self.is_ahead(id) && self.names(id)
    }

    /// Whether the filters let something through; `pick` tells what a filter looks at.
    pub fn matches<'a>(&self, pick: impl Fn(&str) -> Vec<Cow<'a, str>>) -> bool {
        self.filters.matches(pick)
    }

    /// A page of what was found, which is sorted by `key`.
    pub fn page<T: Message + Clone>(self, found: &[T], key: impl Fn(&T) -> &str) -> (Vec<T>, Option<v1::PageResponse>) {
        self.pager.collect(found.iter().map(|one| (key(one), one.clone())))
    }

    /// The same where the keys are not part of what is listed.
    pub fn keyed_page<T: Message + Clone>(self, found: &[(String, T)]) -> (Vec<T>, Option<v1::PageResponse>) {
        self.pager.collect(found.iter().map(|(key, one)| (key.as_str(), one.clone())))
    }
}
