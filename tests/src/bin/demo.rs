//! See `tests::demo`.
fn main() {}
