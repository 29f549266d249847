//! The proof that a linker fits this compiler: a program of ten lines, built the way the real ones are.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    command::{self, say},
    toolchain::Toolchain,
};

const MANIFEST: &str = "[package]
name = \"smoke\"
version = \"0.0.0\"
edition = \"2024\"
[[bin]]
name = \"smoke\"
path = \"smoke.rs\"
[profile.release]
lto = true
panic = \"abort\"
[workspace]
";

const PROGRAM: &str = "#![no_std]
#![no_main]
#[unsafe(no_mangle)]
#[unsafe(link_section = \"xdp\")]
pub extern \"C\" fn pass(_context: *mut core::ffi::c_void) -> u32 {
    2
}
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}
";

/// Whether this linker is proven for this compiler; proves it when that was not done yet.
pub(super) fn proven(toolchain: &Toolchain, linker: &Path) -> bool {
    if fs::read_to_string(stamp(toolchain)).is_ok_and(|stamp| stamp == identity(toolchain, linker))
    {
        return true;
    }
    match prove(toolchain, linker) {
        Ok(()) => true,
        Err(error) => {
            say(
                "setup",
                format!("{} is of no use: {error:#}", linker.display()),
            );
            false
        }
    }
}

/// Builds the program and leaves a stamp, so that it is built once per linker and compiler.
///
/// # Errors
/// When the build fails or its result is no BPF object.
pub(super) fn prove(toolchain: &Toolchain, linker: &Path) -> Result<()> {
    say(
        "setup",
        format!("trying {} on a small program", linker.display()),
    );
    let dir = tempfile::tempdir().context("cannot make a temporary directory")?;
    fs::write(dir.path().join("Cargo.toml"), MANIFEST)?;
    fs::write(dir.path().join("smoke.rs"), PROGRAM)?;
    let target = dir.path().join("target");
    command::read(
        command::cargo()
            .current_dir(dir.path())
            .args([
                "build",
                "--quiet",
                "--release",
                "--target=bpfel-unknown-none",
            ])
            .args(["-Z", "build-std=core", "--target-dir"])
            .arg(&target)
            // Build-std is not stable; this lets the stable compiler do it for this child alone.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker)
            .env(
                "CARGO_ENCODED_RUSTFLAGS",
                "-Cdebuginfo=2\x1f-Clink-arg=--btf",
            )
            .env_remove("RUSTFLAGS")
            .env_remove("RUSTC_WRAPPER")
            .env_remove("RUSTC_WORKSPACE_WRAPPER"),
    )?;
    check(&target.join("bpfel-unknown-none/release/smoke"))?;
    fs::create_dir_all(&toolchain.tools)?;
    fs::write(stamp(toolchain), identity(toolchain, linker)).context("cannot leave the stamp")?;
    Ok(())
}

fn check(object: &Path) -> Result<()> {
    /// `e_machine` of a BPF object (linux/elf-em.h), at offset 18 of the ELF header.
    const EM_BPF: [u8; 2] = [247, 0];
    let bytes = fs::read(object).with_context(|| format!("no object at {}", object.display()))?;
    ensure!(bytes.starts_with(b"\x7fELF"), "the result is no ELF object");
    ensure!(
        bytes.get(18..20) == Some(&EM_BPF),
        "the result is not for BPF"
    );
    for section in [&b"xdp\0"[..], b".BTF\0"] {
        if !bytes.windows(section.len()).any(|window| window == section) {
            bail!(
                "the result has no section {}",
                String::from_utf8_lossy(section)
            );
        }
    }
    Ok(())
}

fn stamp(toolchain: &Toolchain) -> PathBuf {
    toolchain.tools.join("smoke-passed")
}

/// Changes whenever the linker or the compiler does.
fn identity(toolchain: &Toolchain, linker: &Path) -> String {
    let (size, changed) = fs::metadata(linker).map_or((0, 0), |meta| (meta.len(), meta.mtime()));
    format!(
        "{} {size} {changed}\n{}",
        linker.display(),
        toolchain.version.trim_end()
    )
}
