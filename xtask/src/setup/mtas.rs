//! Mail servers beside Postfix: Debian lets nobody install two, so they are fetched by apt and unpacked into the cache.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, bail};

use super::packages;
use crate::{
    command::{self, say},
    debian::World,
    toolchain,
};

/// A server that is unpacked.
struct Server {
    /// Its folder.
    name: &'static str,
    /// It is there when this is.
    program: &'static str,
    packages: &'static [&'static str],
}

const WANTED: &[Server] = &[
    Server {
        name: "exim",
        program: "usr/sbin/exim4",
        packages: &["exim4-daemon-light", "exim4-base"],
    },
    Server {
        name: "opensmtpd",
        program: "usr/sbin/smtpd",
        packages: &["opensmtpd"],
    },
];

/// OpenSMTPD 6 cannot do TLS with OpenSSL 3: where the release has it, the next release's, with the libraries it needs.
const NEXT: &[&str] = &["trixie"];
const OPENSMTPD_OF_NEXT: &[&str] = &[
    "opensmtpd",
    "libc6",
    "libssl3t64",
    "libevent-2.1-7t64",
    "libcrypt1",
    "libdb5.3t64",
    "libpam0g",
    "zlib1g",
    "libzstd1",
    "libaudit1",
    "libcap-ng0",
];

/// Unpacks the missing ones; libraries that they need are installed as usual.
///
/// # Errors
/// When one cannot be fetched.
pub(super) fn ensure() -> Result<()> {
    let folder = toolchain::cache_dir()?.join("mtas");
    for server in WANTED {
        let home = folder.join(server.name);
        if home.join(server.program).is_file() {
            continue;
        }
        if command::find("apt-get").is_none() || !command::is_root() {
            bail!(
                "the tests need {} of Debian, unpacked into {}: run this as root on Debian",
                server.packages.join(" "),
                home.display()
            );
        }
        say(
            "setup",
            format!("fetching {}: the tests send mail to it", server.name),
        );
        // Complete or not there: what a crash leaves half unpacked has another name.
        let half = folder.join(format!("{}.part", server.name));
        let _ = fs::remove_dir_all(&half);
        fs::create_dir_all(&half).with_context(|| format!("cannot make {}", half.display()))?;
        match server.name == "opensmtpd" && is_old()? {
            true => fetch_next(&folder, &half)?,
            false => fetch(server.packages, &half)?,
        }
        fs::rename(&half, &home)?;
    }
    Ok(())
}

/// Is the release's OpenSMTPD of no use?
fn is_old() -> Result<bool> {
    let show = ["show", "--no-all-versions", "opensmtpd"];
    let said = command::read(Command::new("apt-cache").args(show))?;
    let mut lines = said.lines();
    Ok(lines.any(|line| line.starts_with("Version: 6.")))
}

fn fetch_next(folder: &Path, into: &Path) -> Result<()> {
    let world = World::new(folder.join("apt"), NEXT)?;
    world.update()?;
    for archive in world.download(OPENSMTPD_OF_NEXT)? {
        unpack(&archive, into)?;
        fs::remove_file(archive)?;
    }
    Ok(())
}

fn fetch(wanted: &[&str], into: &Path) -> Result<()> {
    let fetched = into.join("fetched");
    fs::create_dir(&fetched).with_context(|| format!("cannot make {}", fetched.display()))?;
    if download(&fetched, wanted).is_err() {
        say("setup", "apt-get: refreshing the package lists");
        packages::refresh()?;
        download(&fetched, wanted)?;
    }
    let mut libraries = Vec::new();
    for archive in fs::read_dir(&fetched)? {
        let archive = archive?.path();
        libraries.extend(libraries_of(&archive)?);
        unpack(&archive, into)?;
    }
    libraries.sort();
    libraries.dedup();
    libraries.retain(|name| !is_installed(name));
    if !libraries.is_empty() {
        let names: Vec<&str> = libraries.iter().map(String::as_str).collect();
        say(
            "setup",
            format!("installing {}: it needs them", names.join(" ")),
        );
        packages::install(&names)?;
    }
    fs::remove_dir_all(&fetched)?;
    Ok(())
}

fn unpack(archive: &Path, into: &Path) -> Result<()> {
    command::run(Command::new("dpkg-deb").arg("-x").arg(archive).arg(into))
}

fn download(folder: &Path, packages: &[&str]) -> Result<()> {
    let mut apt = Command::new("apt-get");
    apt.current_dir(folder);
    // Unless told so, apt complains that its own user may not write here.
    apt.args(["-qq", "-o", "APT::Sandbox::User=root", "download"]);
    command::run(apt.args(packages).stdout(std::io::stderr()))
}

/// The libraries that a package depends on; it may depend on programs too, which a test brings or does without.
fn libraries_of(archive: &Path) -> Result<Vec<String>> {
    let mut dpkg = Command::new("dpkg-deb");
    let depends = command::read(dpkg.arg("-f").arg(archive).arg("Depends"))?;
    let first = |alternatives: &str| {
        let name = alternatives.split(['|', '(', ':']).next()?.trim();
        name.starts_with("lib").then(|| name.to_owned())
    };
    Ok(depends.trim().split(',').filter_map(first).collect())
}

fn is_installed(package: &str) -> bool {
    let mut dpkg = Command::new("dpkg-query");
    dpkg.args(["-W", "-f", "${db:Status-Status}", package]);
    command::read(&mut dpkg).is_ok_and(|status| status.trim() == "installed")
}
