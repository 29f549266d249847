//! Policies on the first packet: what each action does to it, in both families, and what is counted.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use lb_userspace::{
    dataplane::{Question, event},
    model::{
        ClientTls, Forward, Generation, Guard, Method, Policy, Rule, ServerTls, Snat, Terms,
        VirtualServer,
        policy::{Action, Range, Rate},
    },
};

use crate::{
    answers::{check_icmp, check_rst},
    packet::{ACK, Packet, SYN},
    rig::{Outcome, Rig, generation},
};

const SERVICES: [(&str, &str); 2] = [
    ("10.0.1.2:40000", "10.0.1.100:465"),
    ("[fd00:1::2]:40000", "[fd00:1::100]:465"),
];

fn rule(name: &str, source: &[(&str, &str)], action: Action) -> Rule {
    let ends = source.iter().map(|(first, last)| {
        Range::new(
            first.parse().expect("an address"),
            last.parse().expect("an address"),
        )
    });
    let source = match source {
        [] => vec![Range::ALL],
        _ => Range::merged(ends.collect()),
    };
    Rule {
        name: name.into(),
        enabled: true,
        source: source.into(),
        source_file: None,
        vlans: Vec::new(),
        interfaces: Vec::new(),
        schedule: None,
        action,
        log: true,
    }
}

fn policy(name: &str, default: Action, rules: Vec<Rule>) -> Arc<Policy> {
    Arc::new(Policy {
        name: name.into(),
        default,
        log: false,
        rules,
    })
}

/// Both virtual servers guarded like this, with these policies.
fn guarded(guard: &Guard, policies: &[Arc<Policy>]) -> Generation {
    let mut generation = generation(
        Method::RoundRobin,
        &[
            ("four", SERVICES[0].1, Snat::Automap, &["10.0.2.11:4465"]),
            ("six", SERVICES[1].1, Snat::Automap, &["[fd00:2::11]:4465"]),
        ],
    );
    for server in &mut generation.virtual_servers {
        *server = Arc::new(VirtualServer {
            guard: guard.clone(),
            ..(**server).clone()
        });
    }
    generation.policies = policies
        .iter()
        .map(|policy| (policy.name.clone(), policy.clone()))
        .collect();
    generation
}

fn enforced(name: &str) -> Guard {
    Guard {
        policy: Some(name.into()),
        ..Guard::default()
    }
}

fn at(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

fn syn(from: &str, to: &str) -> Packet {
    Packet::new(at(from), at(to), SYN)
}

/// How often a rule has matched: in force and staged.
fn hits(rig: &Rig, rule: &str) -> [u64; 2] {
    let counts = rig.plane.rule_counts();
    counts
        .iter()
        .find(|count| &*count.rule == rule)
        .expect("the rule")
        .hits
}

#[test]
fn each_action_does_what_it_says() {
    let actions = [
        ("accept", Action::Accept, Outcome::Sent, None),
        ("drop", Action::Drop, Outcome::Dropped, Some("policy-drop")),
        (
            "icmp",
            Action::RejectIcmp,
            Outcome::Sent,
            Some("policy-reject"),
        ),
        (
            "rst",
            Action::RejectRst,
            Outcome::Sent,
            Some("policy-reset"),
        ),
    ];
    for (name, action, outcome, reason) in actions {
        let edge = policy("edge", Action::Accept, vec![rule(name, &[], action)]);
        Rig::each(
            "policy-action",
            || guarded(&enforced("edge"), std::slice::from_ref(&edge)),
            1024,
            |rig| {
                for (client, service) in SERVICES {
                    let sent = syn(client, service);
                    for frame in [sent.bytes(), sent.partial_bytes()] {
                        let (got, out) = rig.send(&frame, "c0");
                        assert_eq!(got, outcome, "{name} {client}");
                        match action {
                            Action::RejectIcmp => check_icmp(&sent, &out),
                            Action::RejectRst => {
                                check_rst(&sent, &out, rig.program, frame != sent.bytes())
                            }
                            Action::Drop | Action::Accept => {}
                        }
                    }
                }
                let flows = if action == Action::Accept { 2 } else { 0 };
                assert_eq!(rig.plane.flows().len(), flows, "{name}");
                // The second SYN of each family belonged to the flow of the first, where there was one.
                let judged = if action == Action::Accept { 2 } else { 4 };
                assert_eq!(hits(rig, name), [judged, 0]);
                if let Some(reason) = reason {
                    assert_eq!(rig.drops(reason), 4, "{name}");
                }
            },
        );
    }
}

#[test]
fn the_first_rule_decides_and_the_network_comes_first() {
    let bad = [("10.0.1.2", "10.0.1.2")];
    let network = policy(
        "network",
        Action::Accept,
        vec![rule("banned", &[("10.0.1.66", "10.0.1.66")], Action::Drop)],
    );
    let rules = vec![
        rule("friend", &bad, Action::Accept),
        rule(
            "net",
            &[("10.0.1.0", "10.0.1.255"), ("fd00:1::", "fd00:1::ffff")],
            Action::Drop,
        ),
    ];
    let edge = policy("edge", Action::Accept, rules);
    let make = || {
        let mut generation = guarded(&enforced("edge"), &[network.clone(), edge.clone()]);
        generation.network.guard = enforced("network");
        generation
    };
    Rig::each("policy-order", make, 1024, |rig| {
        let mut sent = |from: &str, to: &str| rig.send(&syn(from, to).bytes(), "c0").0;
        assert_eq!(
            sent("10.0.1.2:1000", SERVICES[0].1),
            Outcome::Sent,
            "friend"
        );
        assert_eq!(
            sent("10.0.1.3:1000", SERVICES[0].1),
            Outcome::Dropped,
            "net"
        );
        assert_eq!(
            sent("10.0.1.66:1000", SERVICES[0].1),
            Outcome::Dropped,
            "banned"
        );
        assert_eq!(
            sent("[fd00:1::2]:1000", SERVICES[1].1),
            Outcome::Dropped,
            "net, IPv6"
        );
        assert_eq!(
            sent("[fd00:1:0:1::2]:1000", SERVICES[1].1),
            Outcome::Sent,
            "default, IPv6"
        );
        assert_eq!(
            [hits(rig, "friend"), hits(rig, "net"), hits(rig, "banned")],
            [[1, 0], [2, 0], [1, 0]]
        );
        // Packets of a connection that was let in cost no lookup, and a change of mind does not end it.
        let mut ack = syn("10.0.1.2:1000", SERVICES[0].1);
        ack.flags = ACK;
        assert_eq!(rig.send(&ack.bytes(), "c0").0, Outcome::Sent);
        assert_eq!(hits(rig, "friend"), [1, 0]);
    });
}

#[test]
fn default_deny_and_staged_policies() {
    let next = policy(
        "next",
        Action::Drop,
        vec![rule("known", &[("10.0.1.2", "10.0.1.9")], Action::Accept)],
    );
    let staged = Guard {
        staged: Some("next".into()),
        ..Guard::default()
    };
    Rig::each(
        "policy-staged",
        || guarded(&staged, std::slice::from_ref(&next)),
        1024,
        |rig| {
            for client in ["10.0.1.2:1", "10.0.1.3:1", "10.0.1.10:1"] {
                assert_eq!(
                    rig.send(&syn(client, SERVICES[0].1).bytes(), "c0").0,
                    Outcome::Sent,
                    "{client}"
                );
            }
            assert_eq!([hits(rig, "known"), hits(rig, "default")], [[0, 2], [0, 1]]);
            // The same policy in force: rules keep their counters.
            rig.apply(guarded(&enforced("next"), std::slice::from_ref(&next)));
            assert_eq!(
                rig.send(&syn("10.0.1.10:2", SERVICES[0].1).bytes(), "c0").0,
                Outcome::Dropped
            );
            assert_eq!(
                rig.send(&syn("10.0.1.9:2", SERVICES[0].1).bytes(), "c0").0,
                Outcome::Sent
            );
            assert_eq!([hits(rig, "known"), hits(rig, "default")], [[1, 2], [1, 1]]);
            // And gone: nobody is judged.
            rig.apply(guarded(&Guard::default(), &[]));
            assert_eq!(
                rig.send(&syn("10.0.1.10:3", SERVICES[0].1).bytes(), "c0").0,
                Outcome::Sent
            );
        },
    );
}

#[test]
fn rules_hold_on_their_interfaces_and_vlans_only() {
    let mut here = rule("here", &[], Action::Drop);
    here.interfaces = vec!["s0".to_owned()];
    let mut tagged = rule("tagged", &[], Action::RejectRst);
    tagged.vlans = vec![10];
    let mut off = rule("off", &[], Action::Drop);
    off.enabled = false;
    let edge = policy("edge", Action::Accept, vec![off, here, tagged]);
    Rig::each(
        "policy-places",
        || guarded(&enforced("edge"), std::slice::from_ref(&edge)),
        1024,
        |rig| {
            let frame = syn("10.0.1.2:1", SERVICES[0].1).bytes();
            assert_eq!(rig.send(&frame, "s0").0, Outcome::Dropped);
            assert_eq!(rig.drops("policy-drop"), 1);
            assert_eq!(rig.send(&tag(&frame, 10), "c0").0, Outcome::Sent);
            assert_eq!(rig.drops("policy-reset"), 1);
            assert!(rig.plane.flows().is_empty());
            assert_eq!(rig.send(&tag(&frame, 11), "c0").0, Outcome::Sent, "carried");
            assert_eq!(rig.plane.flows().len(), 1);
            assert_eq!(
                [
                    hits(rig, "off"),
                    hits(rig, "here"),
                    hits(rig, "tagged"),
                    hits(rig, "default")
                ],
                [[0, 0], [1, 0], [1, 0], [1, 0]]
            );
        },
    );
}

/// The frame with a VLAN tag.
fn tag(frame: &[u8], vlan: u16) -> Vec<u8> {
    [&frame[..12], &[0x81, 0], &vlan.to_be_bytes(), &frame[12..]].concat()
}

#[test]
fn a_source_that_connects_too_often_waits() {
    let guard = Guard {
        rate: Some(Rate {
            interval: 3_600_000_000_000,
            burst: 3,
        }),
        ..Guard::default()
    };
    Rig::each(
        "policy-rate",
        || guarded(&guard, &[]),
        1024,
        |rig| {
            let mut sent = |from: &str, to: &str| rig.send(&syn(from, to).bytes(), "c0").0;
            for host in 1..=3 {
                assert_eq!(
                    sent(&format!("10.0.1.{host}:1"), SERVICES[0].1),
                    Outcome::Sent,
                    "{host}"
                );
                assert_eq!(
                    sent(&format!("[fd00:1::{host}]:1"), SERVICES[1].1),
                    Outcome::Sent,
                    "{host}"
                );
            }
            assert_eq!(
                sent("10.0.1.4:1", SERVICES[0].1),
                Outcome::Dropped,
                "of the same /24"
            );
            assert_eq!(
                sent("[fd00:1::4]:1", SERVICES[1].1),
                Outcome::Dropped,
                "of the same /64"
            );
            assert_eq!(
                sent("10.0.3.4:1", SERVICES[0].1),
                Outcome::Sent,
                "of another"
            );
            assert_eq!(
                sent("[fd00:1:0:1::4]:1", SERVICES[1].1),
                Outcome::Sent,
                "of another"
            );
            assert_eq!(rig.drops("rate-limited"), 2);
            let mut events = rig.plane.events().expect("the events");
            let mut kinds = Vec::new();
            while let Some(item) = events.next() {
                kinds.push(event(&item).expect("an event").kind);
            }
            assert_eq!(kinds, [lb_common::access::Event::LIMITED; 2]);
        },
    );
}

#[test]
fn logged_matches_are_reported() {
    let edge = policy("edge", Action::Accept, vec![rule("bad", &[], Action::Drop)]);
    let guard = Guard {
        staged: Some("edge".into()),
        ..enforced("edge")
    };
    Rig::each(
        "policy-events",
        || guarded(&guard, std::slice::from_ref(&edge)),
        1024,
        |rig| {
            let sent = syn("10.0.1.2:40000", SERVICES[0].1);
            rig.send(&sent.bytes(), "c0");
            let names = rig.plane.rule_names();
            let mut ring = rig.plane.events().expect("the events");
            let mut events = Vec::new();
            while let Some(item) = ring.next() {
                events.push(event(&item).expect("an event"));
            }
            assert_eq!(events.len(), 2, "in force and staged");
            for (event, kind) in events.iter().zip([0, 1]) {
                assert_eq!(event.source.to_socket_addr(event.sport), sent.src);
                assert_eq!(event.destination.to_socket_addr(event.dport), sent.dst);
                assert_eq!((event.kind, event.action), (kind, Action::Drop as u8));
                let (policy, rule) = &names[&event.rule];
                assert_eq!((&**policy, &**rule), ("edge", "bad"));
            }
            // More than the budget: the rest is counted.
            let (program, c0) = (rig.program, crate::rig::index("c0"));
            rig.plane
                .run_packets(program, &sent.bytes(), c0, 2000)
                .expect("a burst");
            let mut got = 0;
            while ring.next().is_some() {
                got += 1;
            }
            let missed = rig.plane.refused(lb_common::access::Spending::Events);
            assert_eq!(got + missed, 4000);
            assert!(missed > 0, "{got} events of 4000 in a burst");
        },
    );
}

#[test]
fn the_proxy_plane_is_guarded_as_well() {
    let edge = policy(
        "edge",
        Action::Accept,
        vec![rule("bad", &[("10.0.1.66", "10.0.1.66")], Action::Drop)],
    );
    let make = || {
        let mut generation = guarded(&enforced("edge"), std::slice::from_ref(&edge));
        for server in &mut generation.virtual_servers {
            *server = Arc::new(VirtualServer {
                forward: Forward::Proxy {
                    client_tls: ClientTls::None,
                    terms: Terms::default(),
                    server_tls: ServerTls::None,
                    xclient: false,
                },
                ..(**server).clone()
            });
        }
        generation
    };
    Rig::each("policy-proxy", make, 1024, |rig| {
        assert_eq!(
            rig.send(&syn("10.0.1.2:1", SERVICES[0].1).bytes(), "c0").0,
            Outcome::Passed
        );
        let bad = syn("10.0.1.66:1", SERVICES[0].1).bytes();
        // XDP leaves it to the TC program behind it, so that nobody is judged twice.
        let behind = rig.program != "balance_tc";
        let (outcome, counted) = if behind {
            (Outcome::Passed, 0)
        } else {
            (Outcome::Dropped, 1)
        };
        assert_eq!(rig.send(&bad, "c0").0, outcome);
        assert_eq!(hits(rig, "bad"), [counted, 0]);
    });
}

#[test]
fn a_hundred_thousand_prefixes_are_searched_as_fast_as_ten() {
    let every_other: Vec<Range> = (0..100_000u128)
        .map(|place| 0xffff_1400_0000 + 2 * place * 256)
        .map(|first| Range {
            first,
            last: first + 255,
        })
        .collect();
    let mut feed = rule("feed", &[], Action::Drop);
    feed.source = every_other.into();
    feed.log = false;
    let edge = policy("edge", Action::Accept, vec![feed]);
    Rig::each(
        "policy-many",
        || guarded(&enforced("edge"), std::slice::from_ref(&edge)),
        1024,
        |rig| {
            let started = Instant::now();
            rig.apply(guarded(&enforced("edge"), std::slice::from_ref(&edge)));
            println!("applied in {:?}", started.elapsed());
            assert!(started.elapsed().as_secs() < 20);
            for (client, outcome) in [
                ("20.0.0.0:1", Outcome::Dropped),
                ("20.0.0.255:1", Outcome::Dropped),
                ("20.0.1.0:1", Outcome::Sent),
                ("20.0.2.7:1", Outcome::Dropped),
                ("23.13.62.7:1", Outcome::Dropped),
                ("23.13.63.7:1", Outcome::Sent),
                ("23.13.64.7:1", Outcome::Sent),
                ("19.255.255.255:1", Outcome::Sent),
            ] {
                // Back to such clients leads no route; that is another reason.
                let before = rig.drops("policy-drop");
                rig.send(&syn(client, SERVICES[0].1).bytes(), "c0");
                let dropped = rig.drops("policy-drop") - before;
                assert_eq!(dropped == 1, outcome == Outcome::Dropped, "{client}");
            }
        },
    );
}

#[test]
fn a_connection_is_explained_and_nothing_changes() {
    let edge = policy(
        "edge",
        Action::Accept,
        vec![rule(
            "bad",
            &[("10.0.1.66", "10.0.1.66")],
            Action::RejectRst,
        )],
    );
    let next = policy("next", Action::Drop, vec![]);
    let guard = Guard {
        staged: Some("next".into()),
        rate: Some(Rate {
            interval: 3_600_000_000_000,
            burst: 1,
        }),
        ..enforced("edge")
    };
    Rig::each(
        "explain",
        || guarded(&guard, &[edge.clone(), next.clone()]),
        1024,
        |rig| {
            let mut ask = |from: &str, to: &str| {
                let question = Question {
                    from: at(from),
                    to: at(to),
                    interface: "c0".to_owned(),
                    vlan: Some(10),
                };
                rig.plane.explain(&question).expect("an answer")
            };
            let rules = |found: &lb_userspace::dataplane::Found| {
                let named = found.rules.iter().flatten();
                named
                    .map(|(policy, rule, _)| format!("{policy}/{rule}"))
                    .collect::<Vec<_>>()
            };
            for _ in 0..3 {
                let found = ask("10.0.1.2:1", SERVICES[0].1);
                assert_eq!((found.refused, found.member), (None, 1));
                assert_eq!(rules(&found), ["edge/default", "next/default"]);
                assert_eq!(
                    found.snat.map(|source| source.ip().to_string()).as_deref(),
                    Some("10.0.2.1")
                );
                let found = ask("10.0.1.66:1", SERVICES[0].1);
                assert_eq!(
                    found.refused.map(|reason| reason.word()),
                    Some("policy-reset")
                );
                assert_eq!(rules(&found), ["edge/bad", "next/default"]);
                assert_eq!(ask("10.0.1.2:1", "10.0.1.100:25").virtual_server, 0);
                assert_eq!(ask("[fd00:1::2]:1", SERVICES[1].1).member, 2);
            }
            assert!(rig.plane.flows().is_empty());
            assert_eq!(hits(rig, "bad"), [0, 0]);
            assert_eq!(rig.plane.drops().values().sum::<u64>(), 0);
            assert!(rig.plane.events().expect("the events").next().is_none());
        },
    );
}
