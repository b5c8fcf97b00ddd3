//! Checks of request fields that several services share.

use hearth_proto::v1;
use hearth_types::Filters;

use crate::api_error::{ApiError, ApiResult};

/// Most ids in one call.
pub(crate) const MAX_IDS: usize = 100;
/// EC2's longest client token.
pub(crate) const MAX_CLIENT_TOKEN: usize = 64;
/// Longest name of a resource, in characters.
pub(crate) const MAX_NAME_CHARS: usize = 255;

/// A resource's name: 1..=255 printable characters without blanks at the ends.
pub(crate) fn name(field: &str, name: &str) -> ApiResult<()> {
    if name.is_empty() {
        return Err(ApiError::missing(field));
    }
    if name.chars().count() > MAX_NAME_CHARS {
        return Err(ApiError::invalid(field, format!("must have at most {MAX_NAME_CHARS} characters")));
    }
    if name.chars().any(char::is_control) || name.trim() != name {
        return Err(ApiError::invalid(field, "must be printable, without blanks at its ends"));
    }
    Ok(())
}

/// Free text of at most `max` characters.
pub(crate) fn text(field: &str, text: &str, max: usize) -> ApiResult<()> {
    if text.chars().count() > max {
        return Err(ApiError::invalid(field, format!("must have at most {max} characters")));
    }
    if text.chars().any(|c| c.is_control() && c != '\n' && c != '\t') {
        return Err(ApiError::invalid(field, "must not hold control characters"));
    }
    Ok(())
}

/// EC2's client token; empty = none.
pub(crate) fn client_token(token: &str) -> ApiResult<()> {
    if token.len() > MAX_CLIENT_TOKEN || token.bytes().any(|b| !b.is_ascii_graphic()) {
        let message = format!("must be at most {MAX_CLIENT_TOKEN} printable ASCII characters");
        return Err(ApiError::invalid("client_token", message));
    }
    Ok(())
}

pub(crate) fn tags(tags: &[v1::Tag]) -> ApiResult<()> {
    Ok(hearth_types::check_tags(tags.iter().map(|tag| (tag.key.as_str(), tag.value.as_str())))?)
}

/// Tags of a field that is not called `tags`.
pub(crate) fn tags_of(field: &str, given: &[v1::Tag]) -> ApiResult<()> {
    let checked = hearth_types::check_tags(given.iter().map(|tag| (tag.key.as_str(), tag.value.as_str())));
    checked.map_err(|error| ApiError::invalid(field, error.to_string()))
}

/// Sorted, each id once. At least one.
pub(crate) fn ids(field: &str, ids: &[String]) -> ApiResult<Vec<String>> {
    if ids.is_empty() {
        return Err(ApiError::missing(field));
    }
    optional_ids(field, ids)
}

/// Sorted, each id once.
pub(crate) fn optional_ids(field: &str, ids: &[String]) -> ApiResult<Vec<String>> {
    if ids.len() > MAX_IDS {
        return Err(ApiError::invalid(field, format!("{} ids, at most {MAX_IDS} in one call", ids.len())));
    }
    let mut ids = ids.to_vec();
    ids.sort();
    ids.dedup();
    Ok(ids)
}

pub(crate) fn filters(filters: &[v1::Filter], known: &[&str]) -> ApiResult<Filters> {
    Ok(Filters::parse(filters.iter().map(|f| (f.name.as_str(), f.values.as_slice())), known)?)
}

/// What `tag:KEY`, `tag-key` and `tag-value` filters look at; `None` for other filters.
pub(crate) fn tag_values<'a>(tags: &'a [v1::Tag], filter: &str) -> Option<Vec<std::borrow::Cow<'a, str>>> {
    let pick = |of: fn(&v1::Tag) -> &str| tags.iter().map(|tag| of(tag).into()).collect();
    match filter {
        "tag-key" => Some(pick(|tag| &tag.key)),
        "tag-value" => Some(pick(|tag| &tag.value)),
        _ => {
            let key = filter.strip_prefix("tag:")?;
            Some(tags.iter().filter(|tag| tag.key == key).map(|tag| tag.value.as_str().into()).collect())
        }
    }
}
