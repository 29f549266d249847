//! The programs that demo and test run: real mail servers and clients, and the tools that build the lab.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use super::Need;
use crate::command::{self, say};

/// A program or a file, and the Debian package that brings it.
const WANTED: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("ethtool", "ethtool"),
    ("nft", "nftables"),
    ("tcpdump", "tcpdump"),
    ("openssl", "openssl"),
    ("curl", "curl"),
    ("swaks", "swaks"),
    ("postfix", "postfix"),
    ("haproxy", "haproxy"),
];

/// What boots other kernels, and unpacks them.
const FOR_KERNELS: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("cpio", "cpio"),
    ("depmod", "kmod"),
    ("xz", "xz-utils"),
];

/// What smtplb is measured beside.
const FOR_BENCH: &[(&str, &str)] = &[("haproxy", "haproxy")];

/// swaks speaks TLS and IPv6 through these; it does not depend on them.
const PERL_MODULES: &[(&str, &str)] = &[
    ("Net/SSLeay.pm", "libnet-ssleay-perl"),
    ("IO/Socket/INET6.pm", "libio-socket-inet6-perl"),
];

/// Installs the missing ones.
///
/// # Errors
/// When something is missing and this process may not install it.
pub(super) fn ensure(need: Need) -> Result<()> {
    let missing = missing(need);
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !command::is_root() {
        bail!(
            "the lab needs these packages: {list}\nInstall them (`sudo apt-get install {list}`), or run as root"
        );
    }
    if command::find("apt-get").is_none() {
        bail!(
            "the lab needs the programs of these Debian packages: {list}\nInstall them with your package manager, then try again"
        );
    }
    say("setup", format!("installing {list}: what the tests run"));
    install(&missing)?;
    let missing = self::missing(need);
    if !missing.is_empty() {
        bail!(
            "still missing after the installation: {}",
            missing.join(" ")
        );
    }
    Ok(())
}

fn missing(need: Need) -> Vec<&'static str> {
    let wanted: &[&[(&str, &str)]] = match need {
        Need::Build | Need::Lint => return Vec::new(),
        Need::Lab => &[WANTED],
        Need::Kernels => &[WANTED, FOR_KERNELS],
        Need::Bench => &[WANTED, FOR_BENCH],
    };
    let programs = wanted
        .iter()
        .copied()
        .flatten()
        .filter(|(program, _)| command::find(program).is_none())
        .map(|(_, package)| *package);
    let absent = absent_perl_modules();
    let modules = PERL_MODULES
        .iter()
        .filter(|(file, _)| absent.contains(file))
        .map(|(_, package)| *package);
    programs.chain(modules).collect()
}

/// All of them when there is no perl; the packages bring it.
fn absent_perl_modules() -> Vec<&'static str> {
    let files: Vec<&str> = PERL_MODULES.iter().map(|(file, _)| *file).collect();
    let search = "for my $f (@ARGV) { print qq($f\n) unless grep { -e qq($_/$f) } @INC }";
    let said = command::read(Command::new("perl").args(["-e", search]).args(&files));
    match said {
        Ok(absent) => files
            .into_iter()
            .filter(|file| absent.lines().any(|line| line == *file))
            .collect(),
        Err(_) => files,
    }
}

/// Installs Debian packages without questions, and without starting what they bring.
///
/// # Errors
/// When apt-get fails.
pub(super) fn install(packages: &[&str]) -> Result<()> {
    let _quiet = NoServiceStart::new()?;
    if packages.contains(&"postfix") {
        // No configuration of its own, so that no boot ever starts it: the lab brings its own instances.
        preseed("postfix postfix/main_mailer_type select No configuration")?;
    }
    if apt(&["install"], packages).is_err() {
        say("setup", "apt-get: refreshing the package lists");
        refresh()?;
        apt(&["install"], packages)?;
    }
    Ok(())
}

/// Asks the mirrors what there is.
///
/// # Errors
/// When apt-get fails.
pub(super) fn refresh() -> Result<()> {
    apt(&["update"], &[])
}

fn apt(verb: &[&str], packages: &[&str]) -> Result<()> {
    command::run(
        Command::new("apt-get")
            .args([
                "-qq",
                "-y",
                "--no-install-recommends",
                "-o",
                "Dpkg::Use-Pty=0",
            ])
            .args(verb)
            .args(packages)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            // stdout belongs to the verb that asked.
            .stdout(std::io::stderr()),
    )
}

fn preseed(answer: &str) -> Result<()> {
    let mut child = Command::new("debconf-set-selections")
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot start debconf-set-selections")?;
    if let Some(mut stdin) = child.stdin.take() {
        writeln!(stdin, "{answer}")?;
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("debconf-set-selections ended with {status}");
    }
    Ok(())
}

/// Tells the package manager not to start services, for as long as it lives (Debian's policy-rc.d).
struct NoServiceStart {
    ours: bool,
}

impl NoServiceStart {
    const PATH: &str = "/usr/sbin/policy-rc.d";

    fn new() -> Result<Self> {
        // One that is there already is the admin's, and says what the admin wants.
        let ours = !Path::new(Self::PATH).exists();
        if ours {
            // 101: the action is forbidden.
            fs::write(Self::PATH, "#!/bin/sh\nexit 101\n")
                .with_context(|| format!("cannot write {}", Self::PATH))?;
            fs::set_permissions(Self::PATH, fs::Permissions::from_mode(0o755))?;
        }
        Ok(Self { ours })
    }
}

impl Drop for NoServiceStart {
    fn drop(&mut self) {
        if self.ours {
            let _ = fs::remove_file(Self::PATH);
        }
    }
}
