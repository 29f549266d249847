//! Virtual servers on prefixes and lists of ports.

use std::sync::Arc;

use lb_userspace::model::{Generation, Method, Places, Snat, VirtualServer};

use crate::{
    packet::{Packet, SYN},
    rig::{Outcome, Rig, generation},
};

/// A virtual server: name, first address, length, ports.
type Place<'a> = (&'a str, &'a str, u8, &'a [(u16, u16)]);

/// Virtual servers at these places.
fn places(servers: &[Place<'_>]) -> Generation {
    let hosts: Vec<_> = servers
        .iter()
        .map(|(name, address, ..)| {
            let six = address.contains(':');
            let at = if six {
                format!("[{address}]:1")
            } else {
                format!("{address}:1")
            };
            (
                *name,
                at,
                if six {
                    "[fd00:2::11]:4465"
                } else {
                    "10.0.2.11:4465"
                },
            )
        })
        .collect();
    let members: Vec<_> = hosts.iter().map(|(_, _, member)| [*member]).collect();
    let listed: Vec<_> = hosts
        .iter()
        .zip(&members)
        .map(|((name, at, _), members)| (*name, at.as_str(), Snat::Automap, &members[..]))
        .collect();
    let mut generation = generation(Method::RoundRobin, &listed);
    for (server, (_, address, length, ports)) in generation.virtual_servers.iter_mut().zip(servers)
    {
        *server = Arc::new(VirtualServer {
            at: Places {
                address: address.parse().expect("an address"),
                length: *length,
                ports: ports.to_vec(),
            },
            ..(**server).clone()
        });
    }
    generation
}

/// The virtual server that took a connection to here, by name.
fn taken(rig: &mut Rig, from: &str, to: &str) -> Option<String> {
    let before = rig.plane.flows().len();
    let syn = Packet::new(
        from.parse().expect("an address"),
        to.parse().expect("an address"),
        SYN,
    );
    let (outcome, _) = rig.send(&syn.bytes(), "c0");
    let flows = rig.plane.flows();
    assert_eq!(outcome == Outcome::Sent, flows.len() > before, "{to}");
    let flow = flows
        .iter()
        .find(|flow| flow.route.client().0.to_socket_addr(flow.route.client().1) == syn.src)?;
    let names = &rig.numbers.virtual_servers;
    names
        .iter()
        .find(|(_, number)| **number == flow.virtual_server)
        .map(|(name, _)| name.to_string())
}

#[test]
fn the_longest_prefix_takes_the_connection() {
    let make = || {
        places(&[
            ("wide", "10.0.16.0", 20, &[(465, 465), (1000, 1010)]),
            ("narrow", "10.0.17.0", 24, &[(465, 465)]),
            ("host", "10.0.17.5", 32, &[(25, 25), (465, 465)]),
            ("six", "fd00:1:0:7::", 64, &[(465, 465)]),
        ])
    };
    Rig::each("prefixes", make, 1024, |rig| {
        let mut port = 1000;
        let mut to = |rig: &mut Rig, at: &str| {
            port += 1;
            let from = if at.starts_with('[') {
                format!("[fd00:1::2]:{port}")
            } else {
                format!("10.0.1.2:{port}")
            };
            taken(rig, &from, at)
        };
        let cases = [
            ("10.0.16.0:465", Some("wide")),
            ("10.0.31.255:1010", Some("wide")),
            ("10.0.32.0:465", None),
            ("10.0.16.1:1011", None),
            ("10.0.17.4:465", Some("narrow")),
            ("10.0.17.5:465", Some("host")),
            ("10.0.17.5:25", Some("host")),
            ("10.0.17.5:1000", Some("wide")),
            ("[fd00:1:0:7:1:2:3:4]:465", Some("six")),
            ("[fd00:1:0:8::]:465", None),
        ];
        for (at, name) in cases {
            assert_eq!(to(rig, at).as_deref(), name, "{at}");
        }
        // Numbers, and with them the counters, stay when a port is added.
        let before = rig.numbers.virtual_servers.clone();
        let mut generation = make();
        let wide = &mut generation.virtual_servers[0];
        *wide = Arc::new(VirtualServer {
            at: Places {
                ports: vec![(26, 26), (465, 465), (1000, 1010)],
                ..wide.at.clone()
            },
            ..(**wide).clone()
        });
        rig.apply(generation);
        assert_eq!(rig.numbers.virtual_servers, before);
        assert_eq!(to(rig, "10.0.16.9:26").as_deref(), Some("wide"));
    });
}
