//! Accounts, key pairs and tags.

use hearth_proto::v1::{Account, ApiToken, KeyPair, TaggedResource};
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::{tags, tags_cell};
use crate::human;
use crate::output::View;

impl View for Account {
    const COLUMNS: &'static [&'static str] = &["ACCOUNT", "NAME", "OPERATOR", "AGE"];
    const NARROW: usize = 4;

    fn cells(&self) -> Vec<String> {
        vec![
            self.account_id.clone(),
            self.name.clone(),
            if self.is_operator { "yes" } else { "no" }.to_owned(),
            human::age(&self.creation_date, OffsetDateTime::now_utc()),
        ]
    }

    fn value(&self) -> Value {
        json!({
            "account_id": self.account_id,
            "name": self.name,
            "is_operator": self.is_operator,
            "creation_date": self.creation_date,
        })
    }

    fn id(&self) -> String {
        self.account_id.clone()
    }
}

impl View for ApiToken {
    const COLUMNS: &'static [&'static str] = &["TOKEN", "DESCRIPTION", "IN USE HERE", "AGE", "ACCOUNT"];
    const NARROW: usize = 4;

    fn cells(&self) -> Vec<String> {
        vec![
            self.token_id.clone(),
            self.description.clone(),
            if self.is_callers { "yes" } else { "" }.to_owned(),
            human::age(&self.creation_date, OffsetDateTime::now_utc()),
            self.account_id.clone(),
        ]
    }

    fn value(&self) -> Value {
        json!({
            "token_id": self.token_id,
            "account_id": self.account_id,
            "description": self.description,
            "creation_date": self.creation_date,
            "is_callers": self.is_callers,
        })
    }

    fn id(&self) -> String {
        self.token_id.clone()
    }
}

impl View for KeyPair {
    const COLUMNS: &'static [&'static str] = &["KEY PAIR", "NAME", "TYPE", "FINGERPRINT", "AGE", "TAGS"];
    const NARROW: usize = 5;

    fn cells(&self) -> Vec<String> {
        vec![
            self.key_pair_id.clone(),
            self.name.clone(),
            self.key_type.clone(),
            self.fingerprint.clone(),
            human::age(&self.creation_date, OffsetDateTime::now_utc()),
            tags_cell(&self.tags, ""),
        ]
    }

    fn value(&self) -> Value {
        json!({
            "key_pair_id": self.key_pair_id,
            "name": self.name,
            "key_type": self.key_type,
            "fingerprint": self.fingerprint,
            "public_key": self.public_key,
            "creation_date": self.creation_date,
            "tags": tags(&self.tags),
        })
    }

    fn id(&self) -> String {
        self.key_pair_id.clone()
    }
}

impl View for TaggedResource {
    const COLUMNS: &'static [&'static str] = &["RESOURCE", "TYPE", "KEY", "VALUE"];
    const NARROW: usize = 4;

    fn cells(&self) -> Vec<String> {
        let tag = self.tag.clone().unwrap_or_default();
        vec![self.resource_id.clone(), self.resource_type.clone(), tag.key, tag.value]
    }

    fn value(&self) -> Value {
        let tag = self.tag.clone().unwrap_or_default();
        json!({
            "resource_id": self.resource_id,
            "resource_type": self.resource_type,
            "key": tag.key,
            "value": tag.value,
        })
    }

    fn id(&self) -> String {
        self.resource_id.clone()
    }
}
