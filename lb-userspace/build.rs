//! Builds the packet programs for the BPF target and embeds them.

#[path = "../lb-ebpf/build/object.rs"]
mod object;

use std::{env, path::PathBuf};

/// Names a ready object to embed instead, for packagers without the toolchain.
const OBJECT: &str = "SMTPLB_BPF_OBJECT";

fn main() {
    println!("cargo::rerun-if-env-changed={OBJECT}");
    let object = match env::var_os(OBJECT) {
        Some(object) => PathBuf::from(object),
        None => object::build("lb-ebpf", "smtplb-ebpf", &["lb-ebpf", "lb-common"]),
    };
    println!("cargo::rustc-env=SMTPLB_EBPF_OBJECT={}", object.display());
}
