//! Builds programs for the BPF target; part of the build scripts that embed them.
//!
//! Stable Rust builds `core` for that target only with `RUSTC_BOOTSTRAP`, which is set for that one child and for no
//! other crate. The linker is looked for where `cargo xtask setup` puts it, then on the path.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// Names the linker.
const LINKER: &str = "SMTPLB_BPF_LINKER";

/// Builds the program `name` of a package of the workspace, whose sources are in `inputs`, and returns the object.
///
/// # Panics
///
/// When it does not build.
pub fn build(package: &str, name: &str, inputs: &[&str]) -> PathBuf {
    println!("cargo::rerun-if-env-changed={LINKER}");
    // As the script runs: a target directory may have come from another copy of the sources.
    let manifest = env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let workspace = Path::new(&manifest).join("..");
    for input in inputs.iter().chain(&["Cargo.lock"]) {
        println!(
            "cargo::rerun-if-changed={}",
            workspace.join(input).display()
        );
    }
    let target = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("bpf");
    let flags = [
        "-Cdebuginfo=2",
        "-Clink-arg=--btf",
        // v3: 32-bit jumps and atomic fetch (Linux 5.12).
        "-Ctarget-cpu=v3",
    ];
    let status = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(&workspace)
        .args(["build", "--package", package, "--bin", name])
        .args(["--features", "bpf", "--profile", "bpf", "--locked"])
        .args(["--target", "bpfel-unknown-none", "-Zbuild-std=core"])
        .arg("--target-dir")
        .arg(&target)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker())
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET")
        .env_remove("CARGO_TARGET_DIR")
        .status();
    match status {
        Ok(status) if status.success() => target.join("bpfel-unknown-none/bpf").join(name),
        _ => {
            panic!("the packet programs do not build; `cargo xtask setup` installs what they need")
        }
    }
}

/// The linker that was asked for, else the one of `cargo xtask setup` for this compiler, else the one on the path.
fn linker() -> PathBuf {
    env::var_os(LINKER)
        .map(PathBuf::from)
        .or_else(installed)
        .unwrap_or_else(|| "bpf-linker".into())
}

fn installed() -> Option<PathBuf> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = String::from_utf8(Command::new(rustc).arg("-vV").output().ok()?.stdout).ok()?;
    let hash = version
        .lines()
        .find_map(|line| line.strip_prefix("commit-hash: "))?
        .get(..12)?;
    let tools = match env::var_os("SMTPLB_TOOLS_DIR") {
        Some(tools) => PathBuf::from(tools),
        None => env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")))?
            .join("smtplb/tools")
            .join(hash),
    };
    Some(tools.join("bin/bpf-linker")).filter(|path| path.exists())
}
