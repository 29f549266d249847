//! Kernels of the distribution: found, fetched and checked by apt, unpacked into a cache, never installed.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result, bail};

use crate::{
    command::{self, say},
    debian::World,
    toolchain,
};

/// Where Debian keeps the kernels of this test: the last release but one, the last, and newer kernels for the last.
const SUITES: [&str; 3] = ["bullseye", "bookworm", "bookworm-backports"];
/// Kernels, each in a folder named after its release.
pub(super) struct Cache {
    folder: PathBuf,
    apt: World,
}

/// An unpacked kernel.
pub(super) struct Kernel {
    /// `uname -r`
    pub(super) release: String,
    folder: PathBuf,
}

impl Kernel {
    /// The bootable image.
    pub(super) fn image(&self) -> PathBuf {
        self.folder.join(format!("boot/vmlinuz-{}", self.release))
    }

    /// Its modules, with their index.
    pub(super) fn modules(&self) -> PathBuf {
        self.folder.join("lib/modules").join(&self.release)
    }

    /// The files of a module and of all that it needs, in the order of loading.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub(super) fn module(&self, name: &str) -> Result<Vec<PathBuf>> {
        let mut modprobe = Command::new(program("modprobe")?);
        modprobe.arg("-d").arg(&self.folder);
        modprobe.args(["-S", &self.release, "--show-depends", name]);
        // A module that is built in is a line `builtin name`.
        Ok(command::read(&mut modprobe)?
            .lines()
            .filter_map(|line| line.strip_prefix("insmod "))
            .map(|path| PathBuf::from(path.trim()))
            .collect())
    }
}

impl Cache {
    /// # Errors
    /// When no folder is there for caches.
    pub(super) fn open() -> Result<Self> {
        let folder = toolchain::cache_dir()?.join("kernels");
        let apt = World::new(folder.join("apt"), &SUITES)?;
        Ok(Self { folder, apt })
    }

    /// The newest kernel of a version such as `6.1`: the one fetched before, else apt's. A year-old copy is as good for
    /// what is tested; removing its folder fetches a newer one.
    ///
    /// # Errors
    /// When apt knows none, or cannot fetch it.
    pub(super) fn kernel(&self, version: &str) -> Result<Kernel> {
        let release = match self.unpacked(version)? {
            Some(release) => release,
            None => self.fetch(version)?,
        };
        let kernel = Kernel {
            folder: self.folder.join(&release),
            release,
        };
        if !kernel.modules().join("modules.dep").is_file() {
            let mut depmod = Command::new(program("depmod")?);
            command::run(depmod.arg("-b").arg(&kernel.folder).arg(&kernel.release))?;
        }
        Ok(kernel)
    }

    fn unpacked(&self, version: &str) -> Result<Option<String>> {
        let mut found = None;
        for entry in fs::read_dir(&self.folder)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if is_of(&name, version) && self.folder.join(&name).join("boot").is_dir() {
                found = found.max(Some(name));
            }
        }
        Ok(found)
    }

    fn fetch(&self, version: &str) -> Result<String> {
        say("kernels", format!("looking for Linux {version}"));
        self.apt.update()?;
        let mut names = self.apt.apt("apt-cache", &["pkgnames", "linux-image-"])?;
        let names = command::read(&mut names)?;
        let mut releases: Vec<&str> = names
            .lines()
            .filter_map(|name| name.strip_prefix("linux-image-"))
            .filter(|release| is_of(release, version))
            .collect();
        releases.sort_by_key(|release| numbers(release));
        let Some(release) = releases.last() else {
            bail!("the distribution has no kernel {version} (looked in {SUITES:?})");
        };
        say("kernels", format!("fetching {release}"));
        let package = format!("linux-image-{release}");
        let archives = self.apt.download(&[&package])?;
        let archive = archives.first().context("apt has fetched nothing")?;
        // Complete or not there: what a crash leaves half unpacked has another name.
        let half = self.folder.join(format!("{release}.part"));
        let _ = fs::remove_dir_all(&half);
        command::run(Command::new("dpkg-deb").arg("-x").arg(archive).arg(&half))?;
        fs::rename(&half, self.folder.join(release))?;
        fs::remove_file(archive)?;
        Ok((*release).to_owned())
    }
}

/// Is `6.1.0-50-amd64` a kernel of version `6.1`? The cloud and real-time flavours are not.
fn is_of(release: &str, version: &str) -> bool {
    let Some(rest) = release
        .strip_prefix(version)
        .and_then(|rest| rest.strip_suffix("-amd64"))
    else {
        return false;
    };
    rest.starts_with('.') && !rest.contains("cloud") && !rest.contains("rt")
}

/// The numbers in a name, by which releases are ordered.
fn numbers(release: &str) -> Vec<u64> {
    release
        .trim_end_matches("-amd64")
        .split(|letter: char| !letter.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

/// # Errors
/// When setup has not installed it.
pub(super) fn program(name: &str) -> Result<PathBuf> {
    command::find(name).with_context(|| format!("{name} is not installed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_belong_to_a_version() {
        assert!(is_of("6.1.0-50-amd64", "6.1"));
        assert!(!is_of("6.12.95+deb12-amd64", "6.1"));
        assert!(is_of("6.12.95+deb12-amd64", "6.12"));
        assert!(!is_of("6.1.0-50-cloud-amd64", "6.1"));
        assert!(!is_of("6.1.0-50-rt-amd64", "6.1"));
        assert!(!is_of("6.1.0-50-amd64-dbg", "6.1"));
    }

    #[test]
    fn newer_is_more_by_numbers() {
        assert!(numbers("6.12.90+deb12.1-amd64") > numbers("6.12.90+deb12-amd64"));
        assert!(numbers("6.12.100+deb12-amd64") > numbers("6.12.95+deb12-amd64"));
    }
}
