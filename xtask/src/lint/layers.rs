//! Who may call whom inside `lb-userspace`: a lower room never knows a higher one, nor its neighbours.

/// A room of `lb-userspace/src`, and what it may not name.
struct Room {
    name: &'static str,
    /// The rooms it may use besides itself.
    uses: &'static str,
    /// Paths that would bring I/O, a clock or a runtime into a room that has none.
    never: &'static [&'static str],
}

/// No I/O in here: bytes and instants come in as arguments.
const PURE: &[&str] = &[
    "tokio::",
    "std::fs",
    "std::net::Tcp",
    "std::thread",
    "aya::",
    "socket2::",
    "rustix::",
];

/// What the admin API says is plain data that every room may fill in; it counts as a room of its own.
const VIEW: &str = "admin::view";

/// From the lowest to the highest. A room that is not listed may use everything.
#[rustfmt::skip]
const ROOMS: &[Room] = &[
    room(VIEW, "", PURE),
    room("model", "", PURE),
    room("smtp", "model", PURE),
    room("config", "model", PURE),
    room("pool", "model", PURE),
    room("telemetry", "model smtp", &["tokio::", "aya::"]),
    room("access", "model telemetry", &["tokio::", "aya::"]),
    room("tls", "model telemetry", &["aya::"]),
    room("dataplane", "admin::view model pool access telemetry", &[]),
    room("proxy", "admin::view model smtp pool access tls telemetry", &["aya::"]),
    room("monitor", "admin::view model smtp pool tls telemetry", &["aya::"]),
    room("admin", "admin::view model pool telemetry dataplane proxy monitor", &["aya::"]),
    room("daemon", "admin::view admin dataplane proxy monitor config model smtp pool access tls telemetry", &[]),
];

const fn room(name: &'static str, uses: &'static str, never: &'static [&'static str]) -> Room {
    Room { name, uses, never }
}

/// What the source of a file breaks: line number and complaint. `path` starts below `lb-userspace/src`.
pub(super) fn faults(path: &str, source: &str) -> Vec<(usize, String)> {
    let path = path.trim_end_matches(".rs");
    let name = match path {
        "admin/view" => VIEW,
        path => path.split('/').next().unwrap_or(path),
    };
    let Some(room) = ROOMS.iter().find(|room| room.name == name) else {
        return Vec::new();
    };
    let mut faults = Vec::new();
    for (line, code) in code_lines(source) {
        for other in named_rooms(code) {
            let known = ROOMS.iter().any(|room| room.name == other) || other == "cli";
            if known && other != room.name && !room.uses.split(' ').any(|name| name == other) {
                faults.push((line, format!("`{}` may not know `{other}`", room.name)));
            }
        }
        for path in room.never {
            if code.contains(path) {
                faults.push((
                    line,
                    format!("`{}` has no business with `{path}`", room.name),
                ));
            }
        }
    }
    faults
}

/// The lines that are code, up to the tests at the end of the file: a test may reach for anything.
fn code_lines(source: &str) -> impl Iterator<Item = (usize, &str)> {
    source
        .lines()
        .enumerate()
        .take_while(|(_, line)| line.trim() != "#[cfg(test)]")
        .map(|(at, line)| (at + 1, line.trim_start()))
        .filter(|(_, line)| !line.starts_with("//"))
}

/// The room named after each `crate::`, also inside `crate::{a::b, c}`.
fn named_rooms(code: &str) -> Vec<&str> {
    let mut rooms = Vec::new();
    for (at, marker) in code.match_indices("crate::") {
        // `$crate` and `other_crate::` are something else.
        if code[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_') {
            continue;
        }
        let rest = &code[at + marker.len()..];
        match rest.strip_prefix('{') {
            Some(group) => rooms.extend(group_heads(group)),
            None => rooms.push(head(rest)),
        }
    }
    rooms
}

/// The room of each member of a group, whose opening brace is already read.
fn group_heads(group: &str) -> Vec<&str> {
    let mut heads = Vec::new();
    let mut depth = 0;
    let mut start = 0;
    for (at, letter) in group.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' if depth == 0 => {
                heads.push(head(group[start..at].trim_start()));
                return heads;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                heads.push(head(group[start..at].trim_start()));
                start = at + 1;
            }
            _ => {}
        }
    }
    heads.push(head(group[start..].trim_start()));
    heads
}

/// The room that a path begins with.
fn head(text: &str) -> &str {
    if text.starts_with(VIEW) {
        return VIEW;
    }
    let end = text
        .find(|letter: char| !letter.is_alphanumeric() && letter != '_')
        .unwrap_or(text.len());
    &text[..end]
}

/// Joins the lines of a `use` that rustfmt broke up, so that a group is seen whole.
pub(super) fn joined_uses(source: &str) -> String {
    let mut joined = String::with_capacity(source.len());
    let mut lines = source.lines();
    while let Some(line) = lines.next() {
        joined.push_str(line);
        let mut followed = 0;
        let starts = line.trim_start();
        if starts.starts_with("use ") || starts.starts_with("pub use ") {
            let mut last = line;
            while !last.contains(';') {
                let Some(next) = lines.next() else { break };
                joined.push(' ');
                joined.push_str(next.trim());
                followed += 1;
                last = next;
            }
        }
        // As many line ends as were taken, so that line numbers stay true.
        joined.push_str(&"\n".repeat(followed + 1));
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaints(path: &str, source: &str) -> Vec<String> {
        faults(path, &joined_uses(source))
            .into_iter()
            .map(|(line, text)| format!("{line}: {text}"))
            .collect()
    }

    #[test]
    fn the_planes_do_not_know_each_other() {
        assert_eq!(
            complaints(
                "proxy/listener.rs",
                "use std::io;\nuse crate::dataplane::Steering;\n"
            ),
            ["2: `proxy` may not know `dataplane`"]
        );
        assert_eq!(
            complaints("dataplane/mod.rs", "fn f() { crate::proxy::start() }"),
            ["1: `dataplane` may not know `proxy`"]
        );
    }

    #[test]
    fn what_the_api_says_may_be_filled_in_by_lower_rooms() {
        let source = "use crate::{admin::view::FlowView, model::Name};\nuse crate::admin::Source;";
        assert_eq!(
            complaints("dataplane/flows.rs", source),
            ["2: `dataplane` may not know `admin`"]
        );
        assert_eq!(
            complaints("admin/view.rs", "use crate::model::Name;"),
            ["1: `admin::view` may not know `model`"]
        );
    }

    #[test]
    fn a_group_over_several_lines_is_seen() {
        let source =
            "\n\nuse crate::{\n    tls::{Name, Pool},\n    admin::server,\n};\nuse tokio::io;\n";
        assert_eq!(
            complaints("smtp/mod.rs", source),
            [
                "3: `smtp` may not know `tls`",
                "3: `smtp` may not know `admin`",
                "7: `smtp` has no business with `tokio::`"
            ]
        );
    }

    #[test]
    fn comments_tests_and_the_own_room_are_free() {
        let source =
            "// see crate::daemon\nuse crate::pool::Pick;\n#[cfg(test)]\nuse crate::daemon;\n";
        assert_eq!(complaints("pool/select.rs", source), Vec::<String>::new());
    }

    #[test]
    fn a_room_without_a_row_may_use_everything() {
        assert_eq!(
            complaints("cli/mod.rs", "use crate::daemon;"),
            Vec::<String>::new()
        );
    }
}
