//! What a file says of sessions and TLS is what the daemon does: one virtual server for each key, and somebody who runs
//! into it.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpStream},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use tests::{
    certs::MAIL_NAME,
    client::{Mode, Options},
    daemon::config::{ClientTls, Config},
    lab::{Family, Host, Lab, Plan},
    member::{Mta, Site},
};

use crate::scene::{Scene, play};

const PATIENCE: Duration = Duration::from_secs(30);

const EARLY: u16 = 2501;
const DETECTED: u16 = 2502;
const ONE: u16 = 2503;
const ONE_EACH: u16 = 2504;
const CERTIFIED: u16 = 2505;
const NAMED: u16 = 2506;
const NEW: u16 = 2507;
const GROUP: u16 = 2508;
const PINNED: u16 = 2509;
const VERIFIED: u16 = 2510;

fn config(lab: &Lab, site: &Site) -> Config {
    let mut config = Config::new(lab, "tc");
    config.certificate("mail", &site.certificate);
    config.pool(lab, "plain", Family::V4, 25, None);
    config.pool(lab, "tls", Family::V4, 465, None);
    let ca = site.ca.display();
    let certified = format!("client_auth = \"require\"\nclient_roots = \"{ca}\"");
    let pinned = format!(
        "server_tls = \"implicit\"\nserver_verify = \"pinned\"\nserver_pins = [\"{}=\"]",
        "A".repeat(43)
    );
    let verified = format!(
        "server_tls = \"implicit\"\nserver_roots = \"{ca}\"\nserver_name = \"{MAIL_NAME}\""
    );
    for (port, pool, tls, lines) in [
        (
            EARLY,
            "plain",
            ClientTls::None,
            "pregreet = { wait = \"1s\", action = \"reject\" }",
        ),
        (
            DETECTED,
            "plain",
            ClientTls::Require,
            "detect_implicit_tls = \"10s\"",
        ),
        (ONE, "plain", ClientTls::None, "max_sessions = 1"),
        (
            ONE_EACH,
            "plain",
            ClientTls::None,
            "max_sessions_per_source = 1",
        ),
        (CERTIFIED, "plain", ClientTls::Implicit, &certified),
        (
            NAMED,
            "plain",
            ClientTls::Implicit,
            "unknown_name = \"refuse\"",
        ),
        (
            NEW,
            "plain",
            ClientTls::Implicit,
            "client_tls_min = \"1.3\"",
        ),
        (
            GROUP,
            "plain",
            ClientTls::Implicit,
            "key_exchange = [\"secp384r1\"]",
        ),
        (PINNED, "tls", ClientTls::None, &pinned),
        (VERIFIED, "tls", ClientTls::None, &verified),
    ] {
        let name = format!("on-{port}");
        config.proxy(&name, Family::V4.virtual_address(), port, pool, tls);
        config.raw(lines);
    }
    config
}

/// A client behind `first`, and the first line that it hears.
fn talk(host: &Host, port: u16, first: &str) -> Result<(TcpStream, String)> {
    let server = SocketAddr::new(Family::V4.virtual_address(), port);
    let mut tcp = host
        .namespace
        .enter(|| Ok(TcpStream::connect_timeout(&server, PATIENCE)?))?;
    tcp.set_read_timeout(Some(PATIENCE))?;
    tcp.write_all(first.as_bytes())?;
    let mut line = String::new();
    BufReader::new(&tcp).read_line(&mut line)?;
    Ok((tcp, line))
}

/// Does OpenSSL shake hands that way?
fn shakes(scene: &Scene<'_>, port: u16, options: &[&str]) -> Result<bool> {
    let server = format!("{}:{port}", Family::V4.virtual_address());
    let ca = scene.site.ca.to_str().context("a path")?;
    let mut openssl = Command::new("openssl");
    openssl
        .args(["s_client", "-connect", &server, "-CAfile", ca])
        .args(options);
    Ok(scene.lab.clients[0].namespace.run(&mut openssl).is_ok())
}

#[test]
fn every_key_does_what_it_says() -> Result<()> {
    play(Plan::TWO_ARM, Mta::Sink, config, |scene| {
        let (one, other) = (&scene.lab.clients[0], &scene.lab.clients[1]);
        let hears = |host: &Host, port, first, start: &str| {
            let (tcp, line) = talk(host, port, first)?;
            ensure!(
                line.starts_with(start),
                "{port}: {line:?} in place of {start}"
            );
            Ok(tcp)
        };
        hears(one, EARLY, "EHLO early\r\n", "554 5.5.1 ")?;
        hears(one, EARLY, "", "220 ")?;
        let held = hears(one, ONE, "", "220 ")?;
        hears(other, ONE, "", "421 4.3.2 ")?;
        drop(held);
        let held = hears(one, ONE_EACH, "", "220 ")?;
        // Of the same /24.
        hears(other, ONE_EACH, "", "421 4.7.0 ")?;
        drop(held);
        hears(one, PINNED, "", "421 4.3.2 ")?;
        hears(one, VERIFIED, "", "220 ")?;

        let chain = scene.site.certificate.chain.to_str().context("a path")?;
        let key = scene.site.certificate.key.to_str().context("a path")?;
        let shown = ["-tls1_2", "-cert", chain, "-key", key];
        for (port, options, wanted) in [
            (DETECTED, &[][..], true),
            (CERTIFIED, &["-tls1_2"], false),
            (CERTIFIED, &shown, true),
            (NAMED, &["-servername", "nobody.example"], false),
            (NAMED, &["-servername", MAIL_NAME], true),
            (NEW, &["-tls1_2"], false),
            (NEW, &["-tls1_3"], true),
            (GROUP, &["-groups", "X25519"], false),
            (GROUP, &["-groups", "P-384"], true),
        ] {
            let shook = shakes(scene, port, options)?;
            ensure!(shook == wanted, "{port} {options:?}: {shook}");
        }
        Ok(())
    })
}

#[test]
fn each_state_of_encryption_has_its_pool() -> Result<()> {
    let config = |lab: &Lab, site: &Site| {
        let mut config = Config::new(lab, "tc");
        config.certificate("mail", &site.certificate);
        config.monitor("opens", "tcp");
        for (name, member) in ["implicit", "starttls", "clear"].iter().zip(&lab.members) {
            config.pool_of(name, member, Family::V4, 25);
        }
        let address = Family::V4.virtual_address();
        config.proxy("smtps", address, 465, "implicit", ClientTls::Implicit);
        config.proxy("smtp", address, 25, "starttls", ClientTls::Allow);
        config.raw("plaintext_pool = \"clear\"");
        config
    };
    play(Plan::TWO_ARM, Mta::Sink, config, |scene| {
        for (port, mode, member) in [
            (465, Mode::Implicit, 0),
            (25, Mode::Starttls, 1),
            (25, Mode::Plain, 2),
        ] {
            let member = &scene.lab.members[member].name;
            let options = Options {
                mode,
                count: 3,
                per_session: 1,
                run: format!("for-{member}"),
                ..Options::to((Family::V4.virtual_address(), port).into())
            };
            scene.send(&scene.lab.clients[0], &options)?;
        }
        let arrivals = scene.site.arrivals()?;
        ensure!(arrivals.len() == 9, "{} arrived", arrivals.len());
        for arrival in arrivals {
            let id = arrival.id.unwrap_or_default();
            let wanted = format!("for-{}-", arrival.member);
            ensure!(id.starts_with(&wanted), "{id} at {}", arrival.member);
        }
        Ok(())
    })
}
