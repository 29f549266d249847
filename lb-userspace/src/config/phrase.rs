//! Faults that objects of every kind share, and the words for values in them.

use toml::{Spanned, de::DeValue};

use super::{
    diagnostic::{Faults, quoted},
    reader::At,
};

/// Consequence of a feature that is still to come.
pub(super) const AS_IF_ABSENT: &str = "smtplb would run as if it were not there.";

/// Notes the use of a feature that is still to come.
pub(super) fn not_yet(at: usize, object: &str, what: &str, instead: &str, faults: &mut Faults) {
    faults.error(
        at,
        object,
        format!("uses {what}, which is not yet supported"),
        AS_IF_ABSENT,
        instead,
    );
}

/// Notes a fault of syntax. False where the tree cannot be trusted any more.
pub(super) fn syntax_fault(error: &toml::de::Error, faults: &mut Faults) -> bool {
    let span = error.span().unwrap_or_default();
    if error.message() == "duplicate key" {
        let key = faults.text(span.clone()).to_owned();
        faults.error(
            span.start,
            "the file",
            format!("sets {} a second time", key.trim_matches(['"', '\''])),
            "Only one of the two could hold.",
            "Remove or rename one of them.",
        );
        return true;
    }
    faults.error(
        span.start,
        "the file",
        format!(
            "is not valid TOML here: {}",
            error.message().replace(char::is_control, " ")
        ),
        "Nothing after this place can be trusted, so nothing is used.",
        "Correct the line; strings need quotes, tables a line like `[pool.msa]`.",
    );
    false
}

/// Names go into commands, metrics and log lines.
pub(super) fn check_name(name: &At<impl AsRef<str>>, object: &str, faults: &mut Faults) {
    let text = name.value.as_ref();
    let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if text.is_empty() || text.len() > 63 || !text.bytes().all(good) {
        faults.error(
            name.at,
            object,
            "has a name that cannot be used",
            "Commands, metrics and log lines could not name it safely.",
            "Use 1 to 63 of these: letters, digits, `-`, `_`, `.`.",
        );
    }
}

/// A value as the user wrote it, near enough.
pub(super) fn shown(value: &Spanned<DeValue<'_>>) -> String {
    match value.get_ref() {
        DeValue::String(text) => quoted(text),
        DeValue::Integer(number) => number.to_string().chars().take(64).collect(),
        DeValue::Float(number) => number.to_string().chars().take(64).collect(),
        other => type_name(other).to_owned(),
    }
}

pub(super) fn type_name(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) => "a number",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}
