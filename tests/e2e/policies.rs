//! Policies as clients meet them: each action, both planes and families, staged, logged and explained.

use std::{
    io,
    net::{SocketAddr, TcpStream},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use lb_userspace::admin::view::{ExplanationView, PolicyView};
use tests::{
    client::{Mode, Options},
    daemon::{
        self,
        config::{ClientTls, Config, tag},
    },
    lab::{Family, Host, Lab, Links, Namespace, Plan},
    mail::Sizes,
    member::{Mta, Site},
    wait::wait_until,
};

use crate::scene::{Scene, play};

/// `EHOSTUNREACH` and `EACCES`: what Linux makes of "administratively prohibited", IPv4 and IPv6.
const PROHIBITED: [i32; 2] = [113, 13];
/// `ECONNREFUSED`.
const REFUSED: i32 = 111;
/// An answer comes sooner; a client that is still busy with its connect() may miss the first.
const PATIENCE: Duration = Duration::from_secs(3);
/// A client that is dropped hears nothing for so long.
const SILENCE: Duration = Duration::from_millis(600);

/// How the first client fares on these ports: passthrough on some, proxy on the others. The second is welcome everywhere.
const PORTS: [(u16, bool, &str); 8] = [
    (465, true, "open"),
    (1465, true, "icmp"),
    (2465, true, "rst"),
    (3465, true, "drop"),
    (25, false, "open"),
    (1025, false, "icmp"),
    (2025, false, "rst"),
    (3025, false, "drop"),
];

fn config(lab: &Lab, _: &Site, attach: &str) -> Config {
    let mut config = Config::new(lab, attach);
    let first = &lab.clients[0];
    for (name, action) in [
        ("icmp", "action = \"reject\""),
        ("rst", "action = \"reject\"\nreject_with = \"rst\""),
        ("drop", "action = \"drop\""),
        ("open", "action = \"accept\""),
    ] {
        config.raw(&format!(
            "\n[policy.{name}]\ndefault = \"accept\"\n[[policy.{name}.rule]]\nname = \"first\"\n\
             source = [\"{}\", \"{}\"]\n{action}\nlog = true",
            first.address(Family::V4),
            first.address(Family::V6),
        ));
    }
    config.raw("\n[policy.next]\ndefault = \"deny\"");
    for family in Family::ALL {
        let tag = tag(family);
        for port in [465, 25] {
            config.pool(lab, &format!("p{port}-{tag}"), family, port, None);
        }
        for (port, passthrough, policy) in PORTS {
            let (name, address) = (format!("vs{port}-{tag}"), family.virtual_address());
            if passthrough {
                config.passthrough(&name, address, port, &format!("p465-{tag}"), "automap");
            } else {
                config.proxy(&name, address, port, &format!("p25-{tag}"), ClientTls::None);
            }
            config.raw(&format!("policy = \"{policy}\"\nstaged_policy = \"next\""));
        }
    }
    config
}

fn connect(from: &Namespace, to: SocketAddr, limit: Duration) -> Result<io::Result<()>> {
    from.enter(|| Ok(TcpStream::connect_timeout(&to, limit).map(drop)))
}

/// What a rejected or dropped client hears, and that it hears it at once.
fn fares(from: &Namespace, to: SocketAddr, policy: &str) -> Result<()> {
    let limit = if policy == "drop" { SILENCE } else { PATIENCE };
    let heard = connect(from, to, limit)?;
    let code = heard.as_ref().err().and_then(io::Error::raw_os_error);
    let right = match policy {
        "open" => heard.is_ok(),
        "icmp" => code == Some(PROHIBITED[usize::from(to.is_ipv6())]),
        "rst" => code == Some(REFUSED),
        _ => heard
            .as_ref()
            .is_err_and(|error| error.kind() == io::ErrorKind::TimedOut),
    };
    ensure!(right, "{to} with policy {policy:?}: {heard:?}");
    Ok(())
}

/// What `smtplb WORDS --json` says.
fn ask<T: serde::de::DeserializeOwned>(lab: &Lab, words: &[&str]) -> Result<T> {
    let out = Command::new(daemon::program()?)
        .args(words)
        .arg("--json")
        .arg("--admin")
        .arg(daemon::socket(lab))
        .output()?;
    let said = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "{words:?}: {said}");
    serde_json::from_slice(&out.stdout).context("JSON")
}

fn everybody_fares(scene: &mut Scene<'_>) -> Result<()> {
    let [first, second, ..] = &scene.lab.clients[..] else {
        anyhow::bail!("two clients")
    };
    let mut sent = Vec::new();
    for family in Family::ALL {
        for (port, _, policy) in PORTS {
            let to = (family.virtual_address(), port).into();
            fares(&first.namespace, to, policy)?;
            fares(&second.namespace, to, "open")?;
        }
        let options = Options {
            mode: Mode::Implicit,
            count: 3,
            sizes: Sizes::MixedUpTo(100_000),
            run: format!("open-{}", tag(family)),
            ..Options::to((family.virtual_address(), 465).into())
        };
        sent.extend(scene.send(first, &options)?);
    }
    scene.check_balance(&sent)?;
    let policies: Vec<PolicyView> = ask(scene.lab, &["show", "policy"])?;
    let rule = |policy: &str, rule: &str| {
        let found = policies
            .iter()
            .find(|view| view.name == policy)
            .context("the policy")?;
        let rule = found
            .rules
            .iter()
            .find(|view| view.name == rule)
            .context("the rule")?;
        Ok::<_, anyhow::Error>((rule.hits, rule.staged_hits))
    };
    for policy in ["icmp", "rst", "drop"] {
        ensure!(rule(policy, "first")?.0 >= 4, "{policy}: {policies:?}");
        ensure!(rule(policy, "default")?.0 >= 4, "{policy}: {policies:?}");
    }
    // Nobody was hindered by the staged policy, and everybody counted.
    ensure!(rule("next", "default")?.1 >= 32, "{policies:?}");
    let drops = scene.daemon.stats()?.drops;
    for reason in ["policy-drop", "policy-reject", "policy-reset"] {
        ensure!(drops[reason] >= 4, "{reason}: {drops:?}");
    }
    the_log_tells(scene, first)?;
    explained(scene.lab, first)
}

fn the_log_tells(scene: &Scene<'_>, first: &Host) -> Result<()> {
    for (action, reason, port) in [
        ("accept", "-", 465),
        ("reject", "policy-reject", 1465),
        ("reject", "policy-reset", 2025),
        ("drop", "policy-drop", 3465),
    ] {
        let fields = [
            format!(
                " action={action} drop_reason={reason} protocol=tcp src_ip={} src_port=",
                first.address(Family::V4)
            ),
            format!(
                " dest_ip={} dest_port={port} policy=",
                Family::V4.virtual_address()
            ),
        ];
        let told = || {
            let log = scene.daemon.log();
            log.lines().any(|line| {
                line.starts_with("firewall date_time=20")
                    && fields.iter().all(|part| line.contains(part.as_str()))
            })
        };
        wait_until(
            Duration::from_secs(10),
            &format!("a line with {fields:?}"),
            told,
        )?;
    }
    Ok(())
}

fn explained(lab: &Lab, first: &Host) -> Result<()> {
    for family in Family::ALL {
        let from = SocketAddr::new(first.address(family), 40_000).to_string();
        for (port, passthrough, policy) in PORTS {
            let to = SocketAddr::new(family.virtual_address(), port).to_string();
            let view: ExplanationView = ask(lab, &["explain", "--from", &from, "--to", &to])?;
            let (verdict, reason) = match policy {
                "open" => ("carried", None),
                "icmp" => ("refused", Some("policy-reject")),
                "rst" => ("refused", Some("policy-reset")),
                _ => ("refused", Some("policy-drop")),
            };
            ensure!(
                (view.verdict.as_str(), view.reason.as_deref()) == (verdict, reason),
                "{view:?}"
            );
            let forward = if passthrough { "passthrough" } else { "proxy" };
            ensure!(view.forward.as_deref() == Some(forward), "{view:?}");
            let rules: Vec<_> = view
                .rules
                .iter()
                .map(|rule| (rule.policy.as_str(), rule.rule.as_str(), rule.staged))
                .collect();
            ensure!(
                rules == [(policy, "first", false), ("next", "default", true)],
                "{rules:?}"
            );
            ensure!(view.member.is_some() == (verdict == "carried"), "{view:?}");
            ensure!(
                view.snat.is_some() == (verdict == "carried" && passthrough),
                "{view:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn every_action_reaches_the_client_by_tc() -> Result<()> {
    let plan = Plan::TWO_ARM;
    play(
        plan,
        Mta::Sink,
        |lab, site| config(lab, site, "tc"),
        everybody_fares,
    )
}

#[test]
fn every_action_reaches_the_client_by_xdp() -> Result<()> {
    let plan = Plan {
        links: Links::ForXdp,
        ..Plan::TWO_ARM
    };
    play(
        plan,
        Mta::Sink,
        |lab, site| config(lab, site, "xdp"),
        everybody_fares,
    )
}

/// Without a passthrough virtual server, programs judge only where something is to be judged; what comes over loopback is
/// judged when its socket is looked up.
#[test]
fn the_proxy_plane_alone_is_guarded_from_outside_and_from_the_box() -> Result<()> {
    let config = |lab: &Lab, _: &Site| {
        let mut config = Config::new(lab, "tc");
        let first = lab.clients[0].address(Family::V4);
        let vip = Family::V4.virtual_address();
        config.raw(&format!(
            "policy = \"edge\"\n\n[policy.edge]\ndefault = \"accept\"\n\
             [[policy.edge.rule]]\nname = \"outside\"\nsource = \"{first}\"\naction = \"reject\"\n\
             [[policy.edge.rule]]\nname = \"inside\"\nsource = \"{vip}\"\naction = \"drop\""
        ));
        config.pool(lab, "plain", Family::V4, 25, None);
        config.proxy("smtp", vip, 25, "plain", ClientTls::None);
        config
    };
    play(Plan::TWO_ARM, Mta::Sink, config, |scene| {
        let to = SocketAddr::new(Family::V4.virtual_address(), 25);
        fares(&scene.lab.clients[0].namespace, to, "icmp")?;
        fares(&scene.lab.clients[1].namespace, to, "open")?;
        // From the box itself the client's address is the virtual one.
        fares(&scene.lab.balancer, to, "rst")?;
        let policies: Vec<PolicyView> = ask(scene.lab, &["show", "policy", "edge"])?;
        let hits: Vec<_> = policies[0].rules.iter().map(|rule| rule.hits).collect();
        ensure!(hits.iter().all(|hits| *hits >= 1), "{policies:?}");
        ensure!(policies[0].enforced_by == ["network"], "{policies:?}");
        Ok(())
    })
}

/// A hundred thousand prefixes from a file: the daemon starts soon, and judges right.
#[test]
fn a_feed_of_a_hundred_thousand_prefixes() -> Result<()> {
    let config = |lab: &Lab, _: &Site| {
        let path = lab.folder().join("feed.txt");
        let mut feed: String = (0..100_000u32)
            .map(|place| {
                let [a, b, c, _] = (0x1400_0000 + place * 512).to_be_bytes();
                format!("{a}.{b}.{c}.0/24\n")
            })
            .collect();
        feed.push_str(&format!(
            "{} # the first client\n",
            lab.clients[0].address(Family::V4)
        ));
        std::fs::write(&path, feed).expect("the feed");
        let mut config = Config::new(lab, "tc");
        config.raw(&format!(
            "\n[policy.feed]\ndefault = \"accept\"\n[[policy.feed.rule]]\nname = \"bad\"\n\
             source_file = \"{}\"\naction = \"reject\"\nreject_with = \"rst\"",
            path.display()
        ));
        config.pool(lab, "tls", Family::V4, 465, None);
        config.passthrough("smtps", Family::V4.virtual_address(), 465, "tls", "automap");
        config.raw("policy = \"feed\"");
        config
    };
    play(Plan::TWO_ARM, Mta::Sink, config, |scene| {
        let to = SocketAddr::new(Family::V4.virtual_address(), 465);
        fares(&scene.lab.clients[0].namespace, to, "rst")?;
        fares(&scene.lab.clients[1].namespace, to, "open")?;
        let policies: Vec<PolicyView> = ask(scene.lab, &["show", "policy", "feed"])?;
        ensure!(policies[0].rules[0].ranges == 100_001, "{policies:?}");
        let to = to.to_string();
        for (from, refused) in [
            ("20.0.0.7", true),
            ("20.0.1.7", false),
            ("23.13.62.255", true),
        ] {
            let view: ExplanationView = ask(scene.lab, &["explain", "--from", from, "--to", &to])?;
            ensure!((view.reason.is_some()) == refused, "{view:?}");
        }
        Ok(())
    })
}

/// A source may connect so often, and then waits.
#[test]
fn a_source_that_connects_too_often_is_not_heard() -> Result<()> {
    let config = |lab: &Lab, _: &Site| {
        let mut config = Config::new(lab, "tc");
        config.pool(lab, "tls", Family::V4, 465, None);
        config.passthrough("smtps", Family::V4.virtual_address(), 465, "tls", "automap");
        config.raw("connection_rate = { per_source = \"1/h\", burst = 5 }");
        config
    };
    play(Plan::TWO_ARM, Mta::Sink, config, |scene| {
        let to = SocketAddr::new(Family::V4.virtual_address(), 465);
        let client = &scene.lab.clients[0];
        for _ in 0..5 {
            fares(&client.namespace, to, "open")?;
        }
        fares(&client.namespace, to, "drop")?;
        // Of the same /24.
        fares(&scene.lab.clients[1].namespace, to, "drop")?;
        ensure!(scene.daemon.stats()?.drops["rate-limited"] >= 2);
        wait_until(Duration::from_secs(10), "a line", || {
            scene
                .daemon
                .log()
                .contains(" drop_reason=rate-limited protocol=tcp ")
        })
    })
}
