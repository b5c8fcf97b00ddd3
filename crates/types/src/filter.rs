//! EC2's filters: values of one filter are alternatives, several filters must all match; `*` stands for any text, `?` for
//! one character, `\` takes the next character literally.
//! Source: <https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/Using_Filtering.html>

use std::borrow::Cow;

use thiserror::Error;

/// Most filters in one request.
pub const MAX_FILTERS: usize = 50;
/// Most values over all filters of one request.
pub const MAX_VALUES: usize = 200;
/// Longest value in bytes.
pub const MAX_VALUE_BYTES: usize = 1024;

/// Why filters are refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FilterError {
    /// No such filter for this call.
    #[error("unknown filter '{name}'; known are {known}")]
    Unknown {
        /// The name as given, shortened.
        name: String,
        /// Known names, comma-separated.
        known: String,
    },
    /// A filter without values matches nothing and is surely a mistake.
    #[error("filter '{0}' has no values")]
    NoValues(String),
    /// Too many or too long.
    #[error("filters: at most {MAX_FILTERS} filters with {MAX_VALUES} values of {MAX_VALUE_BYTES} bytes in all")]
    TooLarge,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Char(char),
    One,
    Any,
}

/// One filter value, ready to match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    tokens: Vec<Token>,
}

impl Pattern {
    /// Reads a value. Every text is a pattern; a trailing `\` stands for itself.
    pub fn new(text: &str) -> Self {
        let mut tokens = Vec::with_capacity(text.len());
        let mut chars = text.chars();
        while let Some(c) = chars.next() {
            match c {
                '*' if tokens.last() == Some(&Token::Any) => {}
                '*' => tokens.push(Token::Any),
                '?' => tokens.push(Token::One),
                '\\' => tokens.push(Token::Char(chars.next().unwrap_or('\\'))),
                c => tokens.push(Token::Char(c)),
            }
        }
        Self { tokens }
    }

    /// Whether the whole of `text` matches; case counts. Takes at most pattern length times text length steps.
    pub fn matches(&self, text: &str) -> bool {
        // On a mismatch only the latest '*' need take one character more: an earlier one could gain nothing.
        let mut rest = text.chars();
        let mut at = 0;
        let mut retry: Option<(usize, std::str::Chars<'_>)> = None;
        loop {
            let token = self.tokens.get(at);
            if token == Some(&Token::Any) {
                at += 1;
                retry = Some((at, rest.clone()));
                continue;
            }
            let mut ahead = rest.clone();
            match (token, ahead.next()) {
                (None, None) => return true,
                (Some(Token::One), Some(_)) => {
                    rest = ahead;
                    at += 1;
                    continue;
                }
                (Some(Token::Char(wanted)), Some(c)) if *wanted == c => {
                    rest = ahead;
                    at += 1;
                    continue;
                }
                _ => {}
            }
            match &mut retry {
                Some((after, from)) => {
                    if from.next().is_none() {
                        return false;
                    }
                    at = *after;
                    rest = from.clone();
                }
                None => return false,
            }
        }
    }
}

/// The filters of one request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filters {
    filters: Vec<(String, Vec<Pattern>)>,
}

impl Filters {
    /// Reads (name, values) pairs. `known` lists the accepted names; one that ends with `:` (such as `tag:`) accepts any
    /// name that continues it.
    pub fn parse<'a, V: AsRef<str> + 'a>(
        given: impl IntoIterator<Item = (&'a str, &'a [V])>,
        known: &[&str],
    ) -> Result<Self, FilterError> {
        let mut filters = Vec::new();
        let mut count = 0usize;
        for (name, values) in given {
            let accepted = known.iter().any(|k| match k.strip_suffix(':') {
                Some(_) => name.len() > k.len() && name.starts_with(k),
                None => *k == name,
            });
            if !accepted {
                let known = known
                    .iter()
                    .map(|k| if k.ends_with(':') { format!("{k}<key>") } else { (*k).to_owned() })
                    .collect::<Vec<_>>()
                    .join(", ");
                return Err(FilterError::Unknown { name: name.chars().take(80).collect(), known });
            }
            if values.is_empty() {
                return Err(FilterError::NoValues(name.to_owned()));
            }
            count = count.saturating_add(values.len());
            let too_long = values.iter().any(|v| v.as_ref().len() > MAX_VALUE_BYTES);
            if filters.len() >= MAX_FILTERS || count > MAX_VALUES || too_long || name.len() > MAX_VALUE_BYTES {
                return Err(FilterError::TooLarge);
            }
            filters.push((name.to_owned(), values.iter().map(|v| Pattern::new(v.as_ref())).collect()));
        }
        Ok(Self { filters })
    }

    /// Whether there are none: everything matches.
    pub fn is_empty(&self) -> bool {
        self.filters.is_empty()
    }

    /// Whether an object matches. `values` tells the object's values for a filter's name; an object without value never
    /// matches that filter.
    pub fn matches<'a, I>(&self, mut values: impl FnMut(&str) -> I) -> bool
    where
        I: IntoIterator<Item = Cow<'a, str>>,
    {
        self.filters.iter().all(|(name, patterns)| {
            values(name).into_iter().any(|value| patterns.iter().any(|pattern| pattern.matches(&value)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, without any cleverness.
    fn naive(pattern: &[char], text: &[char]) -> bool {
        match pattern.split_first() {
            None => text.is_empty(),
            Some(('*', rest)) => (0..=text.len()).any(|n| naive(rest, &text[n..])),
            Some(('?', rest)) => !text.is_empty() && naive(rest, &text[1..]),
            Some(('\\', rest)) if !rest.is_empty() => {
                text.first() == rest.first() && naive(&rest[1..], text.get(1..).unwrap_or_default())
            }
            Some((c, rest)) => text.first() == Some(c) && naive(rest, &text[1..]),
        }
    }

    proptest! {
        #[test]
        fn matching_agrees_with_the_definition(pattern in r"[ab*?\\]{0,8}", text in r"[ab*?\\]{0,10}") {
            let p: Vec<char> = pattern.chars().collect();
            let t: Vec<char> = text.chars().collect();
            prop_assert_eq!(Pattern::new(&pattern).matches(&text), naive(&p, &t));
        }

        #[test]
        fn any_text_matches_itself_when_escaped(text in ".{0,40}") {
            let escaped: String = text.chars().flat_map(|c| ['\\', c]).collect();
            prop_assert!(Pattern::new(&escaped).matches(&text));
        }
    }

    #[test]
    fn hostile_patterns_stay_fast() {
        let pattern = Pattern::new(&"*a".repeat(500));
        assert!(!pattern.matches(&"b".repeat(100_000)));
        assert!(!pattern.matches(&"a".repeat(499)));
        assert!(pattern.matches(&"a".repeat(500)));
    }

    #[test]
    fn values_are_alternatives_and_filters_add_up() {
        let known = ["state", "tag:"];
        let given: [(&str, &[&str]); 2] = [("state", &["running", "stop*"]), ("tag:env", &["prod"])];
        let filters = Filters::parse(given, &known).unwrap();
        let object = |state: &'static str, env: Option<&'static str>| {
            move |name: &str| match name {
                "state" => vec![Cow::Borrowed(state)],
                "tag:env" => env.map(Cow::Borrowed).into_iter().collect(),
                _ => vec![],
            }
        };
        assert!(filters.matches(object("running", Some("prod"))));
        assert!(filters.matches(object("stopping", Some("prod"))));
        assert!(!filters.matches(object("pending", Some("prod"))));
        assert!(!filters.matches(object("running", Some("test"))));
        assert!(!filters.matches(object("running", None)));
    }

    #[test]
    fn unknown_filters_are_named_with_the_known_ones() {
        let known = ["state", "tag:"];
        let values = ["x"];
        let error = Filters::parse([("stat", &values[..])], &known).unwrap_err().to_string();
        assert!(error.contains("'stat'") && error.contains("state, tag:<key>"), "{error}");
        assert!(Filters::parse([("tag:", &values[..])], &known).is_err());
        assert!(matches!(Filters::parse::<&str>([("state", &[][..])], &known), Err(FilterError::NoValues(_))));
        let many = vec!["x"; MAX_VALUES + 1];
        assert_eq!(Filters::parse([("state", &many[..])], &known), Err(FilterError::TooLarge));
    }
}
