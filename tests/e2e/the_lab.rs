//! The lab itself, without a balancer: if these fail, nothing else says anything about smtplb.

use std::{net::SocketAddr, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use tests::{
    client::{self, Mode, Options, Outcome},
    lab::{Family, Lab, Links, Plan, Topology},
    mail::{Message, Sizes},
    member::{Mta, Site},
    program::{Errand, Program},
    verify::Balance,
    wait::wait_until,
};

/// Sends straight to a member, with the box as a plain router.
fn carry(lab: &Lab, mta: Mta) -> Result<()> {
    lab.balancer.sysctl("net/ipv4/ip_forward", "1")?;
    lab.balancer.sysctl("net/ipv6/conf/all/forwarding", "1")?;
    let site = Site::start(lab, mta)?;
    let mut outcomes = Vec::new();
    for family in Family::ALL {
        for (mode, port) in [(Mode::Plain, 25), (Mode::Implicit, 465)] {
            let options = Options {
                mode,
                count: 20,
                sizes: Sizes::MixedUpTo(1_000_000),
                run: format!("{family:?}-{port}"),
                pipelining: family == Family::V6,
                ca: Some(site.ca.clone()),
                ..Options::to((lab.members[1].address(family), port).into())
            };
            let sent = lab.clients[0]
                .namespace
                .enter(|| client::send_all(&options))?;
            ensure!(sent.iter().all(|outcome| outcome.ok), "{}", sent[0].reply);
            if mode == Mode::Implicit {
                let shown = sent[0].certificate.as_deref().context("no certificate")?;
                ensure!(site.owner_of(shown) == Some("m2"));
            }
            outcomes.extend(sent);
            outcomes.extend(with_programs(lab, &site, mode, options.server)?);
        }
    }
    // Postfix says yes first and delivers then.
    let balance = || {
        site.arrivals()
            .map(|arrivals| Balance::of(&outcomes, &arrivals))
    };
    let _ = wait_until(Duration::from_secs(20), "delivery", || {
        balance().is_ok_and(|balance| balance.is_even())
    });
    balance()?.check()
}

/// One message by each program that can.
fn with_programs(lab: &Lab, site: &Site, mode: Mode, server: SocketAddr) -> Result<Vec<Outcome>> {
    let errand = Errand {
        from: &lab.clients[1].namespace,
        server,
        mode,
        ca: &site.ca,
        folder: lab.folder(),
    };
    let mut outcomes = Vec::new();
    for program in Program::ALL.into_iter().filter(|program| program.can(mode)) {
        let run = format!("{}-{server}", program.name());
        let outcome = errand.send(
            program,
            &Message::new(
                &run.replace([':', '[', ']', '.'], "_"),
                0,
                Sizes::Exactly(70_000),
                3,
            ),
        )?;
        ensure!(outcome.ok, "{}: {}", program.name(), outcome.reply);
        ensure!(
            outcome.tls.is_some() == (mode != Mode::Plain),
            "{}",
            outcome.reply
        );
        outcomes.push(outcome);
    }
    Ok(outcomes)
}

#[test]
fn two_arms_carry_mail() -> Result<()> {
    Lab::run(Plan::TWO_ARM, |lab| carry(lab, Mta::Sink))
}

#[test]
fn one_arm_carries_mail() -> Result<()> {
    let topology = Topology::OneArm;
    Lab::run(
        Plan {
            topology,
            ..Plan::TWO_ARM
        },
        |lab| carry(lab, Mta::Sink),
    )
}

#[test]
fn a_router_before_the_members_carries_mail() -> Result<()> {
    let topology = Topology::Routed;
    Lab::run(
        Plan {
            topology,
            ..Plan::TWO_ARM
        },
        |lab| carry(lab, Mta::Sink),
    )
}

#[test]
fn links_made_ready_for_xdp_carry_mail() -> Result<()> {
    let links = Links::ForXdp;
    Lab::run(
        Plan {
            links,
            ..Plan::TWO_ARM
        },
        |lab| carry(lab, Mta::Sink),
    )
}

#[test]
fn postfix_takes_mail() -> Result<()> {
    Lab::run(Plan::TWO_ARM, |lab| carry(lab, Mta::Postfix))
}

#[test]
fn nothing_is_left_of_a_lab() -> Result<()> {
    let lab = Lab::build(Plan::TWO_ARM)?;
    let folder = lab.folder().to_owned();
    let name = lab.balancer.name().to_owned();
    drop(lab);
    ensure!(!folder.exists());
    ensure!(!Path::new("/run/netns").join(name).exists());
    Ok(())
}
