//! Faults are compared as full text, since the text is what the user gets.

mod accepted;
mod advice;
mod capacity;
mod files;
mod hostile;
mod shown;
mod terms;

use super::{Diagnostic, parse};

/// A complete file without a fault; the cases below change a few lines of it.
const BASE: &str = include_str!("base.toml");

fn text(diagnostics: &[Diagnostic]) -> String {
    diagnostics
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn every_fault_is_told_with_place_consequence_and_remedy() {
    walk(include_str!("faults.txt"), 128);
}

#[test]
fn what_comes_later_is_refused_by_name() {
    let cases = include_str!("later.txt");
    walk(cases, 14);
    for case in cases.split("\n\n") {
        assert!(case.contains("is not yet supported"), "{case}");
    }
}

#[test]
fn all_faults_of_a_file_are_told_at_once_by_position() {
    let faults = parse("/etc/smtplb/smtplb.toml", include_str!("many.toml")).unwrap_err();
    assert_eq!(text(&faults) + "\n", include_str!("many.txt"));
    assert!(faults.is_sorted_by_key(|fault| (fault.line, fault.column)));
    assert!(faults.len() >= 20);
}

/// Walks through cases of this shape, an empty line between them:
///
/// ```text
/// # What is wrong
/// - lines of the base file
/// + what stands in their place
///   what is said
/// ```
fn walk(cases: &str, at_least: usize) {
    let mut walked = 0;
    for case in cases.split("\n\n") {
        let part = |mark: char| -> String {
            let lines = case.lines().filter_map(|line| line.strip_prefix(mark));
            lines
                .map(|line| format!("{}\n", line.strip_prefix(' ').unwrap_or(line)))
                .collect()
        };
        let (old, new, expected) = (part('-'), part('+'), part(' '));
        assert!(BASE.contains(&old), "{case}");
        let file = BASE.replacen(&old, &new, 1);
        let faults = parse("smtplb.toml", &file).expect_err(case);
        assert_eq!(text(&faults) + "\n", expected, "{case}");
        walked += 1;
    }
    assert!(walked >= at_least, "{walked} cases");
}
