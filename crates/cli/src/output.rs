//! Prints answers in the wanted form.

use comfy_table::{ContentArrangement, Table};
use serde_json::Value;

use crate::args::OutputForm;
use crate::error::CliError;

/// One kind of object: its columns and everything there is.
pub trait View {
    /// Titles of the table's columns; the last ones only in wide tables.
    const COLUMNS: &'static [&'static str];
    /// How many of them a narrow table has.
    const NARROW: usize;
    /// What stands in the columns.
    fn cells(&self) -> Vec<String>;
    /// Everything, for programs.
    fn value(&self) -> Value;
    /// The id.
    fn id(&self) -> String;
}

/// A list as text, with a newline at its end if it is not empty.
pub fn render_list<V: View>(items: &[V], form: OutputForm) -> Result<String, CliError> {
    match form {
        OutputForm::Table => Ok(render_table::<V>(items, V::NARROW)),
        OutputForm::Wide => Ok(render_table::<V>(items, V::COLUMNS.len())),
        OutputForm::Json | OutputForm::Yaml => {
            render_value(&Value::Array(items.iter().map(View::value).collect()), form)
        }
        OutputForm::Id => Ok(items.iter().map(|item| item.id() + "\n").collect()),
    }
}

/// One object as text: as a list of fields for people.
pub fn render_one<V: View>(item: &V, form: OutputForm) -> Result<String, CliError> {
    match form {
        OutputForm::Table | OutputForm::Wide => Ok(render_fields(&item.value())),
        OutputForm::Json | OutputForm::Yaml => render_value(&item.value(), form),
        OutputForm::Id => Ok(item.id() + "\n"),
    }
}

/// Any value as JSON or YAML (or fields, for people).
pub fn render_value(value: &Value, form: OutputForm) -> Result<String, CliError> {
    match form {
        OutputForm::Json => match serde_json::to_string_pretty(value) {
            Ok(text) => Ok(text + "\n"),
            Err(error) => Err(CliError::Io { action: "write JSON".to_owned(), source: error.into() }),
        },
        OutputForm::Yaml => serde_norway::to_string(value)
            .map_err(|error| CliError::Io { action: "write YAML".to_owned(), source: std::io::Error::other(error) }),
        _ => Ok(render_fields(value)),
    }
}

/// Prints text on standard output. A reader that has gone is no error.
pub fn print(text: &str) -> Result<(), CliError> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(CliError::io("write the answer")(error)),
        _ => Ok(()),
    }
}

/// Prints a list.
pub fn print_list<V: View>(items: &[V], form: OutputForm) -> Result<(), CliError> {
    print(&render_list(items, form)?)
}

/// Prints one object.
pub fn print_one<V: View>(item: &V, form: OutputForm) -> Result<(), CliError> {
    print(&render_one(item, form)?)
}

/// Prints what was done to each of these ids, which is all there is to tell.
pub fn print_done(ids: &[String], field: &str, done: &str, form: OutputForm) -> Result<(), CliError> {
    print(&render_done(ids, field, done, form)?)
}

fn render_done(ids: &[String], field: &str, done: &str, form: OutputForm) -> Result<String, CliError> {
    match form {
        OutputForm::Table | OutputForm::Wide => Ok(ids.iter().map(|id| format!("{id} {done}\n")).collect()),
        OutputForm::Id => Ok(ids.iter().map(|id| format!("{id}\n")).collect()),
        form => {
            let one =
                |id: &String| Value::Object([(field.to_owned(), Value::String(id.clone()))].into_iter().collect());
            render_value(&Value::Array(ids.iter().map(one).collect()), form)
        }
    }
}

fn render_table<V: View>(items: &[V], columns: usize) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Disabled);
    let shown = |cells: Vec<String>| {
        let dash = |cell: String| if cell.is_empty() { "-".to_owned() } else { cell };
        cells.into_iter().take(columns).map(dash).collect::<Vec<_>>()
    };
    table.set_header(V::COLUMNS.iter().take(columns));
    for item in items {
        table.add_row(shown(item.cells()));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    trimmed_lines(&table.to_string())
}

/// `key: value` lines; lists of objects indented below their key.
fn render_fields(value: &Value) -> String {
    let mut out = String::new();
    fields(value, 0, &mut out);
    out
}

fn fields(value: &Value, depth: usize, out: &mut String) {
    let Value::Object(map) = value else {
        out.push_str(&format!("{:depth$}{}\n", "", scalar(value)));
        return;
    };
    let width = map.keys().map(|key| key.len()).max().unwrap_or(0);
    for (key, value) in map {
        let name = key.replace('_', " ");
        match value {
            Value::Array(items) if items.iter().any(Value::is_object) => {
                out.push_str(&format!("{:depth$}{name}:\n", ""));
                for item in items {
                    let flat = item.as_object().map(|map| {
                        let pair =
                            |(key, value): (&String, &Value)| format!("{} {}", key.replace('_', " "), scalar(value));
                        map.iter().filter(|(_, value)| !empty(value)).map(pair).collect::<Vec<_>>().join(", ")
                    });
                    out.push_str(&format!("{:depth$}  {}\n", "", flat.unwrap_or_else(|| scalar(item))));
                }
            }
            Value::Object(inner) if !inner.is_empty() => {
                out.push_str(&format!("{:depth$}{name}:\n", ""));
                fields(value, depth + 2, out);
            }
            value if empty(value) => {}
            value => out.push_str(&format!("{:depth$}{:width$}  {}\n", "", name, scalar(value))),
        }
    }
}

fn empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(scalar).collect::<Vec<_>>().join(", "),
        Value::Object(map) => {
            map.iter().map(|(key, value)| format!("{key} {}", scalar(value))).collect::<Vec<_>>().join(", ")
        }
        other => other.to_string(),
    }
}

fn trimmed_lines(text: &str) -> String {
    text.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    struct Thing(&'static str, u32);

    impl View for Thing {
        const COLUMNS: &'static [&'static str] = &["ID", "COUNT", "MORE"];
        const NARROW: usize = 2;
        fn cells(&self) -> Vec<String> {
            vec![self.0.to_owned(), self.1.to_string(), String::new()]
        }
        fn value(&self) -> Value {
            json!({"id": self.0, "count": self.1, "none": null, "parts": [{"name": "a", "size": 1}], "inner": {"x": "y"}})
        }
        fn id(&self) -> String {
            self.0.to_owned()
        }
    }

    #[test]
    fn the_same_list_in_every_form() {
        let things = [Thing("i-1", 5), Thing("i-22", 66)];
        let render = |form| render_list(&things, form).unwrap();
        assert_eq!(render(OutputForm::Table), "ID    COUNT\ni-1   5\ni-22  66\n");
        assert_eq!(render(OutputForm::Wide), "ID    COUNT  MORE\ni-1   5      -\ni-22  66     -\n");
        assert_eq!(render(OutputForm::Id), "i-1\ni-22\n");
        let parsed: Value = serde_json::from_str(&render(OutputForm::Json)).unwrap();
        assert_eq!(parsed[1]["count"], 66);
        assert!(render(OutputForm::Yaml).contains("- count: 5") || render(OutputForm::Yaml).contains("- id: i-1"));
        assert_eq!(render_list::<Thing>(&[], OutputForm::Json).unwrap(), "[]\n");
        assert_eq!(render_list::<Thing>(&[], OutputForm::Id).unwrap(), "");
        assert_eq!(render_list::<Thing>(&[], OutputForm::Table).unwrap(), "ID  COUNT\n");
    }

    #[test]
    fn what_was_done_is_told_in_every_form() {
        let ids = ["i-1".to_owned(), "i-2".to_owned()];
        let render = |form| render_done(&ids, "instance_id", "is rebooting", form).unwrap();
        assert_eq!(render(OutputForm::Table), "i-1 is rebooting\ni-2 is rebooting\n");
        assert_eq!(render(OutputForm::Id), "i-1\ni-2\n");
        let parsed: Value = serde_json::from_str(&render(OutputForm::Json)).unwrap();
        assert_eq!(parsed, json!([{"instance_id": "i-1"}, {"instance_id": "i-2"}]));
    }

    #[test]
    fn one_object_for_people_leaves_out_what_is_empty() {
        let text = render_one(&Thing("i-1", 5), OutputForm::Table).unwrap();
        assert!(
            text.contains("count  5\n") && text.contains("  name a, size 1\n") && text.contains("inner:\n  x  y\n"),
            "{text}"
        );
        assert!(!text.contains("none"));
    }
}
