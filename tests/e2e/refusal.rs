//! What smtplb refuses to start with: it says what, ends with the right code, and leaves nothing half-applied.

use std::{fs, process::Command};

use anyhow::{Context, Result, ensure};
use aya::util::KernelVersion;
use tests::{
    daemon::{self, Daemon, config::Config},
    lab::{Family, Lab, Plan},
    member::{Mta, Site},
};

/// From sysexits.h, as the manual page lists them.
const CONFIG: i32 = 78;
const PRIVILEGE: i32 = 77;

/// A configuration that would do, changed by one replacement.
struct Case {
    what: &'static str,
    from: &'static str,
    to: &'static str,
    code: i32,
    /// Words that the message has to hold.
    says: &'static [&'static str],
}

const CASES: &[Case] = &[
    Case {
        what: "an interface that does not exist",
        from: "\"srv0\"",
        to: "\"srv9\"",
        code: CONFIG,
        says: &["srv9"],
    },
    Case {
        what: "an unknown key",
        from: "attach =",
        to: "atach =",
        code: CONFIG,
        says: &["smtplb.toml:4:1", "atach", "attach"],
    },
    Case {
        what: "a pool that does not exist",
        from: "pool = \"tls-v4\"",
        to: "pool = \"tls-v5\"",
        code: CONFIG,
        says: &["tls-v5"],
    },
    Case {
        what: "a certificate that is not there",
        from: "balancer.pem",
        to: "nobody.pem",
        code: CONFIG,
        says: &["nobody.pem"],
    },
    Case {
        what: "a key of another certificate",
        from: "balancer.key",
        to: "m1.key",
        code: CONFIG,
        says: &["mail", "m1.key"],
    },
    Case {
        what: "a certificate that is none",
        from: "balancer.pem",
        to: "m1.jsonl",
        code: CONFIG,
        says: &["m1.jsonl"],
    },
];

#[test]
fn a_faulty_configuration_changes_nothing() -> Result<()> {
    Lab::run(Plan::TWO_ARM, |lab| {
        let site = Site::start(lab, Mta::Sink)?;
        let good = Config::site(lab, "tc", &site.certificate).text().to_owned();
        for case in CASES {
            ensure!(
                good.contains(case.from),
                "{}: nothing to replace",
                case.what
            );
            let output =
                daemon::refused(lab, &good.replace(case.from, case.to)).context(case.what)?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(
                output.status.code() == Some(case.code),
                "{}: {} {said}",
                case.what,
                output.status
            );
            for word in case.says {
                ensure!(
                    said.contains(word),
                    "{}: no word of {word} in: {said}",
                    case.what
                );
            }
            check_untouched(lab).context(case.what)?;
        }
        Ok(())
    })
}

#[test]
fn a_missing_capability_is_named() -> Result<()> {
    // setpriv --bounding-set -NAME, and what has to be said.
    const MISSING: &[(&str, &str)] = &[
        ("-bpf,-sys_admin", "CAP_BPF"),
        ("-net_admin,-sys_admin", "CAP_NET_ADMIN"),
    ];
    Lab::run(Plan::TWO_ARM, |lab| {
        let site = Site::start(lab, Mta::Sink)?;
        let config = Config::site(lab, "tc", &site.certificate);
        for (capabilities, name) in MISSING {
            let output = daemon::refused_as(lab, config.text(), |daemon| {
                let mut setpriv = Command::new("setpriv");
                setpriv
                    .arg(format!("--bounding-set={capabilities}"))
                    .arg("--");
                setpriv.arg(daemon.get_program()).args(daemon.get_args());
                setpriv
            })?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(
                output.status.code() == Some(PRIVILEGE),
                "{}: {said}",
                output.status
            );
            ensure!(said.contains(name), "{said}");
            check_untouched(lab)?;
        }
        Ok(())
    })
}

/// The oldest kernel that the packet programs load on.
const FLOOR: KernelVersion = KernelVersion::new(5, 15, 0);

#[test]
fn every_kernel_is_served_or_refused_by_name() -> Result<()> {
    Lab::run(Plan::TWO_ARM, |lab| {
        let site = Site::start(lab, Mta::Sink)?;
        let config = Config::site(lab, "tc", &site.certificate);
        if KernelVersion::current()? >= FLOOR {
            let daemon = Daemon::start(lab, config.text())?;
            let status = daemon.status()?;
            println!("degraded: {:?}", status.kernel.degraded);
            return Ok(());
        }
        let output = daemon::refused(lab, config.text())?;
        let said = String::from_utf8_lossy(&output.stderr);
        let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
        println!("{said}");
        ensure!(output.status.code() == Some(1), "{}", output.status);
        for word in ["Linux 5.15 or newer", release.trim()] {
            ensure!(said.contains(word), "no word of {word} in: {said}");
        }
        check_untouched(lab)
    })
}

/// No program, no pin, no address, no socket.
fn check_untouched(lab: &Lab) -> Result<()> {
    let links = lab
        .balancer
        .run(Command::new("ip").args(["-details", "link"]))?;
    ensure!(!links.contains("prog/xdp"), "{links}");
    let addresses = lab
        .balancer
        .run(Command::new("ip").args(["-oneline", "address"]))?;
    for family in Family::ALL {
        ensure!(
            !addresses.contains(&format!("{}/", family.virtual_address())),
            "{addresses}"
        );
    }
    ensure!(
        !daemon::has_pins(&daemon::bpffs(lab)),
        "something is pinned"
    );
    ensure!(!daemon::socket(lab).exists(), "the admin socket is there");
    let forwards = lab.balancer.read_sysctl("net/ipv4/conf/cli0/forwarding")?;
    ensure!(forwards == "0", "forwarding is on");
    Ok(())
}

#[test]
fn check_reports_every_fault_of_a_file_at_once() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("smtplb.toml");
    fs::write(
        &path,
        "[network]\nclient_interfaces = [\"cli0\"]\nserver_interfaces = [\"srv0\"]\nattach = \"fast\"\n\
         [pool.empty]\n[virtual_server.a]\naddress = \"10.0.0.1\"\nport = 70000\nforward = \"passthrough\"\npool = \"none\"\n",
    )?;
    let output = Command::new(daemon::program()?)
        .arg("check")
        .arg(&path)
        .output()?;
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    ensure!(
        output.status.code() == Some(CONFIG),
        "{}: {said}",
        output.status
    );
    for place in [
        "smtplb.toml:4:",
        "smtplb.toml:5:",
        "smtplb.toml:8:",
        "smtplb.toml:10:",
    ] {
        ensure!(said.contains(place), "nothing at {place}: {said}");
    }
    Ok(())
}
