//! The smtplb binary.
fn main() {}
