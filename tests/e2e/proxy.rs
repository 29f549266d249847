//! The proxy plane: every way of TLS towards clients, with the programs that people use, to real Postfix.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use tests::{
    client::{Mode, Options, Session},
    daemon::config::{ClientTls, Config, tag},
    lab::{Family, Lab, Plan},
    mail::{Message, Sizes},
    member::{Mta, Site},
    program::{Errand, Program},
    wire,
};

use crate::scene::{Scene, play};

/// A virtual server of the proxy plane, and how clients may come.
struct Case {
    name: &'static str,
    port: u16,
    tls: ClientTls,
    modes: &'static [Mode],
}

const CASES: [Case; 4] = [
    Case {
        name: "require",
        port: 587,
        tls: ClientTls::Require,
        modes: &[Mode::Starttls],
    },
    Case {
        name: "allow",
        port: 25,
        tls: ClientTls::Allow,
        modes: &[Mode::Plain, Mode::Starttls],
    },
    Case {
        name: "plain",
        port: 2525,
        tls: ClientTls::None,
        modes: &[Mode::Plain],
    },
    Case {
        name: "implicit",
        port: 465,
        tls: ClientTls::Implicit,
        modes: &[Mode::Implicit],
    },
];

fn config(lab: &Lab, site: &Site) -> Config {
    let mut config = Config::new(lab, "tc");
    config.certificate("mail", &site.certificate);
    config.monitor("answers", "smtp");
    for family in Family::ALL {
        let pool = format!("plain-{}", tag(family));
        config.pool(lab, &pool, family, 25, Some("answers"));
        for case in &CASES {
            let name = format!("{}-{}", case.name, tag(family));
            config.proxy(&name, family.virtual_address(), case.port, &pool, case.tls);
        }
    }
    config
}

#[test]
fn everybodys_programs_reach_postfix() -> Result<()> {
    play(Plan::TWO_ARM, Mta::Postfix, config, |scene| {
        let mut sent = Vec::new();
        for (case, family) in CASES
            .iter()
            .flat_map(|case| Family::ALL.map(|family| (case, family)))
        {
            let server = SocketAddr::new(family.virtual_address(), case.port);
            for &mode in case.modes {
                let errand = Errand {
                    from: &scene.lab.clients[0].namespace,
                    server,
                    mode,
                    ca: &scene.site.ca,
                    folder: scene.lab.folder(),
                };
                let run = |who: &str| {
                    format!("{who}-{}-{mode:?}-{}", case.name, tag(family)).to_lowercase()
                };
                for program in Program::ALL.into_iter().filter(|program| program.can(mode)) {
                    let message = Message::new(&run(program.name()), 0, Sizes::Exactly(300_000), 1);
                    let outcome = errand.send(program, &message)?;
                    ensure!(outcome.ok, "{}: {}", message.id, outcome.reply);
                    ensure!(
                        outcome.tls.is_some() == (mode != Mode::Plain),
                        "{}",
                        outcome.reply
                    );
                    sent.push(outcome);
                }
                let options = Options {
                    mode,
                    count: 10,
                    sizes: Sizes::MixedUpTo(2_000_000),
                    run: run("send"),
                    pipelining: true,
                    ..Options::to(server)
                };
                let own = scene.send(&scene.lab.clients[1], &options)?;
                check_certificates(scene, mode, &own)?;
                sent.extend(own);
            }
        }
        scene.check_balance(&sent)?;
        for arrival in scene.site.arrivals()? {
            ensure!(arrival.tls.is_none(), "server_tls = none, but {arrival:?}");
        }
        Ok(())
    })
}

/// Where there is TLS, it ends at the box.
fn check_certificates(
    scene: &Scene<'_>,
    mode: Mode,
    sent: &[tests::client::Outcome],
) -> Result<()> {
    let boxes = wire::fingerprint(&scene.site.certificate.chain)?;
    for outcome in sent {
        let expected = (mode != Mode::Plain).then_some(&boxes);
        ensure!(outcome.certificate.as_ref() == expected, "{outcome:?}");
        let greeted_by = scene
            .site
            .members
            .iter()
            .any(|member| outcome.greeting.contains(&member.name));
        ensure!(
            greeted_by,
            "the greeting is the member's own: {}",
            outcome.greeting
        );
    }
    Ok(())
}

#[test]
fn an_rsa_certificate_serves_as_well() -> Result<()> {
    let config = |lab: &Lab, site: &Site| {
        let mut config = Config::new(lab, "tc");
        config.certificate("mail", &site.certificate_rsa);
        config.pool(lab, "plain", Family::V4, 25, None);
        config.proxy(
            "submission",
            Family::V4.virtual_address(),
            587,
            "plain",
            ClientTls::Require,
        );
        config
    };
    play(Plan::TWO_ARM, Mta::Sink, config, |scene| {
        let options = Options {
            mode: Mode::Starttls,
            ..Options::to((Family::V4.virtual_address(), 587).into())
        };
        let sent = scene.send(&scene.lab.clients[0], &options)?;
        let rsa = wire::fingerprint(&scene.site.certificate_rsa.chain)?;
        ensure!(sent[0].certificate.as_ref() == Some(&rsa), "{sent:?}");
        scene.check_balance(&sent)
    })
}

#[test]
fn what_is_announced_follows_the_policy() -> Result<()> {
    play(Plan::TWO_ARM, Mta::Sink, config, |scene| {
        let tls = wire::client_config(&scene.site.ca)?;
        // Virtual server, mode of the client, and whether STARTTLS is then offered.
        for (port, mode, offered) in [
            (587, Mode::Plain, true),
            (587, Mode::Starttls, false),
            (25, Mode::Plain, true),
            (25, Mode::Starttls, false),
            (2525, Mode::Plain, false),
            (465, Mode::Implicit, false),
        ] {
            let options = Options {
                mode,
                ..Options::to((Family::V6.virtual_address(), port).into())
            };
            scene.lab.clients[0].namespace.enter(|| {
                let mut session = Session::open(&options, Some(&tls))?;
                let says = |word: &str| {
                    session
                        .capabilities()
                        .iter()
                        .any(|line| line.starts_with(word))
                };
                ensure!(
                    says("STARTTLS") == offered,
                    "{port} {mode:?}: {:?}",
                    session.capabilities()
                );
                ensure!(
                    says("PIPELINING") && says("8BITMIME"),
                    "{port}: {:?}",
                    session.capabilities()
                );
                let mail = session.command("MAIL", "MAIL FROM:<sender@lab.example>", '2');
                if port == 587 && mode == Mode::Plain {
                    let refusal = mail.err().context("mail before TLS was taken")?.to_string();
                    ensure!(refusal.contains("530 5.7.0"), "{refusal}");
                } else {
                    mail?;
                }
                session.quit();
                Ok(())
            })?;
        }
        Ok(())
    })
}
