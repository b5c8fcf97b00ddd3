//! Paging: opaque tokens that name the last key of a page. Lists are sorted by keys that never change, so an object that exists
//! all the while is in exactly one page, whatever is created or deleted between them. A token carries a MAC and is only good for
//! the request that it came from, and for a day.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hearth_proto::v1;
use hmac::{Hmac, Mac};
use prost::Message;
use sha2::{Digest, Sha256};
use tonic::Code;

use crate::api_error::{ApiError, ApiResult};
use crate::clock;
use crate::core::Core;

/// Most results of a page, and how many it has when nothing is said.
pub(crate) const MAX_RESULTS: u32 = 1000;
/// A page ends early when it has this many bytes, so that clients with gRPC's default limit of 4 MiB can read it.
const MAX_PAGE_BYTES: usize = 2 << 20;
/// How long a token is good.
const TOKEN_TTL_MS: u64 = 24 * 3600 * 1000;
const VERSION: u8 = 1;
const SCOPE_BYTES: usize = 16;
const MAC_BYTES: usize = 16;
const MAX_TOKEN_BYTES: usize = 2048;

type HmacSha256 = Hmac<Sha256>;

/// Cuts one page out of a sorted list.
pub(crate) struct Pager {
    key: Vec<u8>,
    scope: [u8; SCOPE_BYTES],
    limit: usize,
    after: Option<String>,
}

impl Pager {
    /// `call` and `request` (with its page taken out) say what the token is good for.
    pub fn new(
        core: &Core,
        call: &str,
        account: &str,
        request: &impl Message,
        page: Option<&v1::PageRequest>,
    ) -> ApiResult<Self> {
        let key = core.tables().cluster.as_ref().map(|cluster| cluster.page_key.clone()).unwrap_or_default();
        Self::with_key(key, call, account, request, page, clock::now_ms())
    }

    fn with_key(
        key: Vec<u8>,
        call: &str,
        account: &str,
        request: &impl Message,
        page: Option<&v1::PageRequest>,
        now_ms: u64,
    ) -> ApiResult<Self> {
        let mut digest = Sha256::new();
        digest.update(format!("{call}\0{account}\0"));
        digest.update(request.encode_to_vec());
        let mut scope = [0u8; SCOPE_BYTES];
        scope.iter_mut().zip(digest.finalize()).for_each(|(to, from)| *to = from);
        let mut pager = Self { key, scope, limit: MAX_RESULTS as usize, after: None };
        if let Some(page) = page {
            if page.max_results > MAX_RESULTS {
                return Err(ApiError::invalid("page.max_results", format!("must be at most {MAX_RESULTS}")));
            }
            if page.max_results > 0 {
                pager.limit = page.max_results as usize;
            }
            if !page.next_token.is_empty() {
                pager.after = Some(pager.open(&page.next_token, now_ms)?);
            }
        }
        Ok(pager)
    }

    /// Whether an object's key lies behind the pages already given.
    pub fn wants(&self, key: &str) -> bool {
        self.after.as_deref().is_none_or(|after| key > after)
    }

    /// Takes a page from objects that are sorted by key, already filtered and all wanted.
    pub fn collect<'a, T: Message>(
        self,
        objects: impl Iterator<Item = (&'a str, T)>,
    ) -> (Vec<T>, Option<v1::PageResponse>) {
        let mut page = Vec::new();
        let mut bytes = 0usize;
        let mut last = String::new();
        for (key, object) in objects {
            let size = object.encoded_len();
            if page.len() >= self.limit || (!page.is_empty() && bytes.saturating_add(size) > MAX_PAGE_BYTES) {
                let next_token = self.seal(&last, clock::now_ms());
                return (page, Some(v1::PageResponse { next_token }));
            }
            bytes = bytes.saturating_add(size);
            last.clear();
            last.push_str(key);
            page.push(object);
        }
        (page, Some(v1::PageResponse::default()))
    }

    fn mac(&self, body: &[u8]) -> Option<HmacSha256> {
        // HMAC takes keys of any length.
        let mut mac = HmacSha256::new_from_slice(&self.key).ok()?;
        mac.update(body);
        Some(mac)
    }

    fn seal(&self, last: &str, now_ms: u64) -> String {
        let mut body = vec![VERSION];
        body.extend_from_slice(&now_ms.to_be_bytes());
        body.extend_from_slice(&self.scope);
        body.extend_from_slice(last.as_bytes());
        if let Some(mac) = self.mac(&body) {
            body.extend(mac.finalize().into_bytes().into_iter().take(MAC_BYTES));
        }
        URL_SAFE_NO_PAD.encode(body)
    }

    fn open(&self, token: &str, now_ms: u64) -> ApiResult<String> {
        let refuse =
            |why: &str| ApiError::new(Code::InvalidArgument, "InvalidNextToken", format!("page.next_token {why}"));
        let foreign = || refuse("is not a token of this service");
        if token.len() > MAX_TOKEN_BYTES {
            return Err(foreign());
        }
        let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| foreign())?;
        let (body, mac) = bytes.split_at_checked(bytes.len().saturating_sub(MAC_BYTES)).ok_or_else(foreign)?;
        let good = self.mac(body).is_some_and(|expected| expected.verify_truncated_left(mac).is_ok());
        if !good || mac.len() != MAC_BYTES {
            return Err(foreign());
        }
        let (&version, rest) = body.split_first().ok_or_else(foreign)?;
        let (issued, rest) = rest.split_first_chunk::<8>().ok_or_else(foreign)?;
        let (scope, last) = rest.split_first_chunk::<SCOPE_BYTES>().ok_or_else(foreign)?;
        if version != VERSION {
            return Err(foreign());
        }
        if *scope != self.scope {
            return Err(refuse("belongs to a request with other parameters"));
        }
        if now_ms.saturating_sub(u64::from_be_bytes(*issued)) > TOKEN_TTL_MS {
            return Err(refuse("is stale: list from the beginning again"));
        }
        String::from_utf8(last.to_vec()).map_err(|_| foreign())
    }
}

#[cfg(test)]
#[path = "paging_test.rs"]
mod tests;
