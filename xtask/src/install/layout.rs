//! Where everything lies.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::command;

/// The service, and the file system that its programs and tables are pinned in.
pub(super) const UNITS: [&str; 2] = ["smtplb.service", "run-smtplb-bpf.mount"];

/// The file system that is installed to.
pub(super) struct Layout {
    root: PathBuf,
}

impl Layout {
    /// # Errors
    /// When `root` cannot be made.
    pub(super) fn new(root: &Path) -> Result<Self> {
        fs::create_dir_all(root).with_context(|| format!("cannot make {}", root.display()))?;
        let root = root
            .canonicalize()
            .with_context(|| format!("cannot find {}", root.display()))?;
        Ok(Self { root })
    }

    /// Whether this is the running system, not a tree to be packed.
    pub(super) fn is_live(&self) -> bool {
        self.root == Path::new("/")
    }

    /// # Errors
    /// When the running system is meant and this is not root.
    pub(super) fn check_writable(&self) -> Result<()> {
        if self.is_live() && !command::is_root() {
            bail!(
                "only root may change the running system; `--root DIR` works on a tree of your own"
            );
        }
        Ok(())
    }

    pub(super) fn binary(&self) -> PathBuf {
        self.root.join("usr/local/sbin/smtplb")
    }

    pub(super) fn config_folder(&self) -> PathBuf {
        self.root.join("etc/smtplb")
    }

    pub(super) fn config(&self) -> PathBuf {
        self.config_folder().join("smtplb.toml")
    }

    pub(super) fn unit(&self, name: &str) -> PathBuf {
        self.root.join("etc/systemd/system").join(name)
    }

    pub(super) fn runtime(&self) -> PathBuf {
        self.root.join("run/smtplb")
    }

    pub(super) fn bpffs(&self) -> PathBuf {
        self.runtime().join("bpf")
    }

    pub(super) fn state(&self) -> PathBuf {
        self.root.join("var/lib/smtplb")
    }

    /// In a tree of its own, the folders that `install` had to make go too.
    pub(super) fn remove_empty_folders(&self) {
        if self.is_live() {
            return;
        }
        for folder in [
            "usr/local/sbin",
            "usr/local",
            "usr",
            "etc/systemd/system",
            "etc/systemd",
            "etc",
            "var/lib",
            "var",
            "run",
        ] {
            // Fails, and is meant to, when something else is in it.
            let _ = fs::remove_dir(self.root.join(folder));
        }
    }
}
