//! Builds the programs that put packets in front of the packet programs, and embeds them.

#[path = "../lb-ebpf/build/object.rs"]
mod object;

fn main() {
    let object = object::build("tests-bpf", "tests-bpf", &["tests/bpf"]);
    println!("cargo::rustc-env=SMTPLB_TESTS_OBJECT={}", object.display());
}
