//! Debian's packages without installing them: apt in a world of its own, with its own sources and lists.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::command;

/// Whose signature apt asks for.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// apt with other sources, and nothing installed.
pub(crate) struct World {
    folder: PathBuf,
    suites: &'static [&'static str],
}

impl World {
    /// In a folder of its own, which is made.
    ///
    /// # Errors
    /// When that cannot be done.
    pub(crate) fn new(folder: PathBuf, suites: &'static [&'static str]) -> Result<Self> {
        for part in ["lists/partial", "archives/partial"] {
            let part = folder.join(part);
            fs::create_dir_all(&part).with_context(|| format!("cannot make {}", part.display()))?;
        }
        Ok(Self { folder, suites })
    }

    /// Learns what there is.
    ///
    /// # Errors
    /// When this is no Debian, or apt fails.
    pub(crate) fn update(&self) -> Result<()> {
        ensure!(
            Path::new(KEYRING).is_file() && command::find("apt-get").is_some(),
            "these packages are Debian's, fetched by apt and checked with {KEYRING}: run it on Debian"
        );
        let mirror = mirror()?;
        let lines: String = self
            .suites
            .iter()
            .map(|suite| format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n"))
            .collect();
        fs::write(self.folder.join("sources.list"), lines)?;
        fs::write(self.folder.join("status"), "")?;
        command::run(
            self.apt("apt-get", &["-qq", "update"])?
                .stdout(std::io::stderr()),
        )
    }

    /// Fetches packages; the archives with them.
    ///
    /// # Errors
    /// When apt knows one of them not, or cannot fetch it.
    pub(crate) fn download(&self, packages: &[&str]) -> Result<Vec<PathBuf>> {
        let mut apt = self.apt("apt-get", &["-qq", "download"])?;
        command::run(apt.args(packages).stdout(std::io::stderr()))?;
        let mut archives = Vec::new();
        for package in packages {
            let archive = fs::read_dir(&self.folder)?
                .filter_map(|entry| Some(entry.ok()?.path()))
                .find(|path| {
                    let name = path.file_name().unwrap_or_default().to_string_lossy();
                    name.starts_with(&format!("{package}_")) && name.ends_with(".deb")
                })
                .with_context(|| format!("apt has fetched no {package}"))?;
            archives.push(archive);
        }
        Ok(archives)
    }

    /// A command of apt's in this world.
    ///
    /// # Errors
    /// When the folder has no path.
    pub(crate) fn apt(&self, program: &str, arguments: &[&str]) -> Result<Command> {
        let apt = std::path::absolute(&self.folder)?;
        let mut command = Command::new(program);
        command.current_dir(&apt);
        for (option, path) in [
            ("Dir::Etc::sourcelist", "sources.list"),
            ("Dir::State::lists", "lists"),
            ("Dir::State::status", "status"),
            ("Dir::Cache", ""),
        ] {
            let path = apt.join(path);
            command
                .arg("-o")
                .arg(format!("{option}={}", path.display()));
        }
        for option in [
            "Dir::Etc::sourceparts=/dev/null",
            "APT::Architecture=amd64",
            "APT::Architectures=amd64",
            "Acquire::Languages=none",
            // Old releases are signed no more, and this machine's clock is its own.
            "Acquire::Check-Valid-Until=false",
            "APT::Sandbox::User=root",
        ] {
            command.args(["-o", option]);
        }
        command.args(arguments);
        Ok(command)
    }
}

/// The mirror that this machine's own apt uses.
fn mirror() -> Result<String> {
    let mut apt = Command::new("apt-get");
    apt.args(["indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(LABEL)"]);
    let said = command::read(&mut apt)?;
    said.lines()
        .find_map(|line| line.strip_suffix(" Debian Debian"))
        .map(|uri| uri.trim_end_matches('/').to_owned())
        .context("apt has no source of Debian's: these packages come from there")
}
