//! Which compiler is at work, and where the tools that go with it are kept.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::command;

/// What decides whether a BPF linker fits: it has to read the bitcode of exactly this compiler.
#[derive(Debug)]
pub(crate) struct Toolchain {
    /// `rustc -vV` in full.
    pub(crate) version: String,
    /// Major version of the LLVM inside rustc.
    pub(crate) llvm_major: u32,
    /// Where rustc's own libraries and sources are.
    pub(crate) sysroot: PathBuf,
    /// Where the tools for this compiler are kept.
    pub(crate) tools: PathBuf,
}

impl Toolchain {
    /// Asks rustc.
    ///
    /// # Errors
    /// When rustc cannot be run or does not say what it is.
    pub(crate) fn detect() -> Result<Self> {
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let version = command::read(Command::new(&rustc).arg("-vV"))?;
        let sysroot = command::read(Command::new(&rustc).args(["--print", "sysroot"]))?;
        let llvm = field(&version, "LLVM version")?;
        let llvm_major = llvm
            .split('.')
            .next()
            .and_then(|major| major.parse().ok())
            .with_context(|| format!("rustc says LLVM version {llvm:?}"))?;
        // A distribution's rustc has no commit hash; its release number is as good.
        let hash = match field(&version, "commit-hash")? {
            "unknown" => field(&version, "release")?,
            hash => hash,
        };
        let tools = tools_dir(hash)?;
        Ok(Self {
            llvm_major,
            sysroot: PathBuf::from(sysroot.trim_end()),
            tools,
            version,
        })
    }

    /// The BPF linker that setup puts in place.
    pub(crate) fn linker(&self) -> PathBuf {
        self.tools.join("bin/bpf-linker")
    }

    /// Whether the sources of `core` are there; building for BPF needs them.
    pub(crate) fn has_rust_src(&self) -> bool {
        self.sysroot
            .join("lib/rustlib/src/rust/library/core/Cargo.toml")
            .is_file()
    }
}

/// One directory per compiler, because the linker is bound to the LLVM of that compiler.
///
/// `SMTPLB_TOOLS_DIR` names another one. lb-userspace/build.rs knows the same rule.
fn tools_dir(hash: &str) -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("SMTPLB_TOOLS_DIR") {
        return std::path::absolute(dir).context("SMTPLB_TOOLS_DIR");
    }
    Ok(cache_dir()?
        .join("tools")
        .join(hash.get(..12).unwrap_or(hash)))
}

/// The user's cache directory, our part of it.
///
/// # Errors
/// When the user has neither that nor a home.
pub(crate) fn cache_dir() -> Result<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .filter(|dir| Path::new(dir).is_absolute())
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache")))
        .context(
            "neither XDG_CACHE_HOME nor HOME is set: nowhere to keep what is fetched and built",
        )?;
    Ok(cache.join("smtplb"))
}

fn field<'a>(version: &'a str, name: &str) -> Result<&'a str> {
    version
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
        .with_context(|| format!("`rustc -vV` does not say its {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_fields_of_rustc() {
        let version = "rustc 1.95.0\ncommit-hash: 0123456789abcdef\nLLVM version: 22.1.2\n";
        assert_eq!(field(version, "commit-hash").unwrap(), "0123456789abcdef");
        assert_eq!(field(version, "LLVM version").unwrap(), "22.1.2");
        assert!(field(version, "release").is_err());
    }
}
