//! bpf-linker: turns the bitcode that rustc emits into an object the kernel loads.
//!
//! It has to be bound to an LLVM at least as new as the one inside rustc. rustup ships that very LLVM as a shared
//! library, so a linker can be built against it without any other LLVM on the machine.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use super::smoke;
use crate::{
    command::{self, say},
    toolchain::Toolchain,
};

const VERSION: &str = "0.13.0";

/// Finds a linker that works, or installs one.
///
/// # Errors
/// When every way to get one has failed; the message lists them.
pub(super) fn ensure(toolchain: &Toolchain) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("SMTPLB_BPF_LINKER") {
        let path = PathBuf::from(path);
        if !usable(&path) {
            bail!(
                "SMTPLB_BPF_LINKER names {}, which does not run",
                path.display()
            );
        }
        return Ok(path);
    }
    if let Some(path) = present(toolchain) {
        return Ok(path);
    }
    // Someone else may install it while we wait for the lock.
    let _lock = super::lock(toolchain)?;
    if let Some(path) = present(toolchain) {
        return Ok(path);
    }
    install(toolchain)
}

/// The linker of the tools directory, or one of PATH, when it is proven for this compiler.
fn present(toolchain: &Toolchain) -> Option<PathBuf> {
    [Some(toolchain.linker()), command::find("bpf-linker")]
        .into_iter()
        .flatten()
        .find(|path| usable(path) && smoke::proven(toolchain, path))
}

/// Runs it: a linker whose LLVM went away with an updated compiler fails to start.
fn usable(linker: &Path) -> bool {
    linker.is_file() && command::read(Command::new(linker).arg("--version")).is_ok()
}

/// One way to get a linker: what it is called, whether it applies here, and how it is done.
type Way = (
    &'static str,
    fn(&Toolchain) -> bool,
    fn(&Toolchain) -> Result<()>,
);

const WAYS: [Way; 3] = [
    ("cargo binstall", has_binstall, binstall),
    (
        "building it against the LLVM inside rustc",
        has_own_llvm,
        build_with_own_llvm,
    ),
    (
        "building it against the distribution's LLVM",
        has_system_llvm,
        build_with_system_llvm,
    ),
];

fn install(toolchain: &Toolchain) -> Result<PathBuf> {
    say(
        "setup",
        format!(
            "no BPF linker for this compiler in {} or PATH; bpf-linker {VERSION} is needed to build the kernel plane",
            toolchain.tools.display()
        ),
    );
    let mut tried = Vec::new();
    for (name, applies, way) in WAYS {
        if !applies(toolchain) {
            tried.push(format!("{name}: not possible here"));
            continue;
        }
        say("setup", format!("bpf-linker: {name}"));
        let linker = toolchain.linker();
        match way(toolchain).and_then(|()| smoke::prove(toolchain, &linker)) {
            Ok(()) => {
                say("setup", format!("bpf-linker: ready, {}", linker.display()));
                return Ok(linker);
            }
            Err(error) => {
                say(
                    "setup",
                    format!("bpf-linker: {name} did not work: {error:#}"),
                );
                tried.push(format!("{name}: {error:#}"));
            }
        }
    }
    bail!(
        "no bpf-linker could be installed:\n  {}\nInstall bpf-linker {VERSION} yourself and put it in PATH, or name it in SMTPLB_BPF_LINKER",
        tried.join("\n  ")
    )
}

fn has_binstall(_: &Toolchain) -> bool {
    command::find("cargo-binstall").is_some()
}

fn binstall(toolchain: &Toolchain) -> Result<()> {
    command::run(
        command::cargo()
            .args(["binstall", "--no-confirm", "--force", "--root"])
            .arg(&toolchain.tools)
            .arg(format!("bpf-linker@{VERSION}")),
    )
}

fn has_own_llvm(toolchain: &Toolchain) -> bool {
    own_llvm(toolchain).is_some()
}

/// rustc's shared LLVM: `libLLVM.so.` and a version.
fn own_llvm(toolchain: &Toolchain) -> Option<PathBuf> {
    fs::read_dir(toolchain.sysroot.join("lib"))
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("libLLVM.so."))
        })
}

fn build_with_own_llvm(toolchain: &Toolchain) -> Result<()> {
    let library = own_llvm(toolchain).context("rustc has no shared LLVM")?;
    let prefix = toolchain.tools.join("llvm");
    let lib = prefix.join("lib");
    let _ = fs::remove_dir_all(&lib);
    fs::create_dir_all(&lib).with_context(|| format!("cannot make {}", lib.display()))?;
    // The build asks for libLLVM.so; the finished linker asks for the library's own name.
    let own_name = library.file_name().unwrap_or_default();
    for name in [Path::new("libLLVM.so"), Path::new(own_name)] {
        symlink(&library, lib.join(name))
            .with_context(|| format!("cannot link {}", name.display()))?;
    }
    say(
        "setup",
        "bpf-linker: this takes about a minute, once per compiler",
    );
    cargo_install(toolchain, &prefix)
}

fn has_system_llvm(toolchain: &Toolchain) -> bool {
    system_prefix(toolchain).join("lib").is_dir()
        || (command::is_root() && command::find("apt-get").is_some())
}

fn system_prefix(toolchain: &Toolchain) -> PathBuf {
    PathBuf::from(format!("/usr/lib/llvm-{}", toolchain.llvm_major))
}

fn build_with_system_llvm(toolchain: &Toolchain) -> Result<()> {
    let prefix = system_prefix(toolchain);
    if !prefix.join("include/llvm").is_dir() {
        super::packages::install(&[&format!("llvm-{}-dev", toolchain.llvm_major)])?;
    }
    cargo_install(toolchain, &prefix)
}

fn cargo_install(toolchain: &Toolchain, llvm_prefix: &Path) -> Result<()> {
    command::run(
        command::cargo()
            .args([
                "install",
                "bpf-linker",
                "--version",
                VERSION,
                "--locked",
                "--force",
            ])
            .arg("--no-default-features")
            .arg(format!("--features=llvm-{}", toolchain.llvm_major))
            .arg("--root")
            .arg(&toolchain.tools)
            .env("LLVM_PREFIX", llvm_prefix)
            .stdout(Stdio::null()),
    )
}
