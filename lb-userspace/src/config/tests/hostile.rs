//! No input may panic, hang, or be half accepted.

use std::fmt::Write;

use super::*;
use crate::config::MAX_FILE;

/// Characters that mean something to TOML, and some that mean nothing to anyone.
const SPLINTERS: [&str; 14] = [
    "\"", "'", "[", "]", "{", "}", "=", ".", "\n", "\0", "#", "ä", "9", "\u{feff}",
];

#[test]
fn any_splinter_at_any_place_is_survived() {
    for (at, character) in BASE.char_indices() {
        let (before, after) = BASE.split_at(at);
        for splinter in SPLINTERS {
            judge(&format!("{before}{splinter}{after}"));
        }
        judge(before);
        judge(after);
        judge(&format!("{before}{}", &after[character.len_utf8()..]));
    }
}

#[test]
fn any_line_may_be_missing_or_moved() {
    let lines: Vec<_> = BASE.lines().collect();
    for missing in 0..lines.len() {
        let mut rest = lines.clone();
        let line = rest.remove(missing);
        judge(&rest.join("\n"));
        rest.push(line);
        judge(&rest.join("\r\n"));
        rest.insert(0, line);
        judge(&rest.join("\n"));
    }
}

#[test]
fn noise_is_survived() {
    // xorshift64*, seeded: the same noise on every machine.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |below: usize| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % below
    };
    for _ in 0..3000 {
        let mut bytes = BASE.as_bytes().to_vec();
        for _ in 0..1 + next(8) {
            let at = next(bytes.len());
            match next(3) {
                0 => bytes[at] = next(256) as u8,
                1 => drop(bytes.drain(at..(at + next(40)).min(bytes.len()))),
                _ => {
                    let from = next(bytes.len());
                    let piece = bytes[from..(from + next(60)).min(bytes.len())].to_vec();
                    bytes.splice(at..at, piece);
                }
            }
        }
        judge(&String::from_utf8_lossy(&bytes));
    }
}

#[test]
fn depth_and_length_are_bounded() {
    let deep = 200_000;
    judge(&"[".repeat(deep));
    judge(&format!("a = {}", "[".repeat(deep)));
    judge(&format!("a = {}{}", "[".repeat(deep), "]".repeat(deep)));
    judge(&format!("a = {}", "{ a = ".repeat(deep)));
    judge(&format!("{}a = 1", "a.".repeat(deep)));
    judge(&format!("[{}a]", "a.".repeat(deep)));
    judge(&format!("mode = \"{}\"", "x".repeat(MAX_FILE - 20)));
    judge(&"a".repeat(MAX_FILE));
    let faults = parse("smtplb.toml", &"#".repeat(MAX_FILE + 1)).unwrap_err();
    assert_eq!(
        text(&faults),
        "smtplb.toml:1:1: error: the file is longer than 1024 KiB\n  Nothing of it is read.\n  Name the right file."
    );
}

#[test]
fn a_flood_of_objects_is_refused_in_good_time() {
    let mut file = String::from("[network]\nclient_interfaces = [\"eth0\"]\n");
    for number in 0..1024 {
        writeln!(
            file,
            "[virtual_server.v{number}]\naddress = \"2001:db8::{number:x}\"\nport = 25\nforward = \"proxy\"\npool = \"p0\""
        )
        .unwrap();
    }
    for pool in 0..256 {
        writeln!(file, "[pool.p{pool}]\nmember = [").unwrap();
        for member in 0..if pool == 0 { 65 } else { 4 } {
            writeln!(file, "{{ address = \"10.{member}.0.1\", port = 25 }},").unwrap();
        }
        writeln!(file, "]").unwrap();
    }
    assert_eq!(
        text(&parse("smtplb.toml", &file).unwrap_err()),
        "\
smtplb.toml:5118:17: error: the file has 1024 virtual servers
  1023 is the most; virtual server \"v1023\" is the first beyond it.
  Run a second box for the rest.
smtplb.toml:5124:10: error: pool \"p0\" has 65 members
  64 is the most in one pool.
  Spread them over several pools.
smtplb.toml:6864:7: error: pool \"p240\" brings the file to 1025 members
  1023 is the most in all pools together.
  Share pools between virtual servers, or run a second box.
smtplb.toml:6969:7: error: the file has 256 pools
  255 is the most; pool \"p255\" is the first beyond it.
  Share pools between virtual servers, or run a second box."
    );
}

/// Neither a panic nor a fault without a place, an object or a way out.
fn judge(file: &str) {
    let diagnostics = match parse("smtplb.toml", file) {
        Ok((generation, warnings)) => {
            for server in &generation.virtual_servers {
                assert!(
                    generation.pools.contains_key(&server.pool) && server.at.first().port() != 0,
                    "{file}"
                );
            }
            for pool in generation.pools.values() {
                assert!(!pool.members.is_empty(), "{file}");
            }
            warnings
        }
        Err(faults) => {
            assert!(!faults.is_empty(), "{file}");
            faults
        }
    };
    assert!(
        diagnostics.is_sorted_by_key(|found| (found.line, found.column)),
        "{file}"
    );
    for found in diagnostics {
        let parts = [
            &found.object,
            &found.message,
            &found.consequence,
            &found.remedy,
        ];
        assert!(
            found.line > 0 && found.column > 0 && parts.iter().all(|part| !part.is_empty()),
            "{found}"
        );
        assert!(
            found.to_string().lines().count() == 3 && found.to_string().len() < 1000,
            "{found}"
        );
    }
}
