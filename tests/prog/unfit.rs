//! A generation that does not fit the tables, and what the one in use has of it: nothing.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use lb_userspace::model::{Generation, Method, PortRange, Snat, SnatPool};

use crate::{
    packet::{Packet, SYN},
    rig::{Outcome, Rig, generation, ip},
};

const SERVICE: &str = "10.0.1.100:465";
const MEMBERS: [&str; 3] = ["10.0.2.11:465", "10.0.2.12:465", "10.0.2.13:465"];

/// Fewer ports of the box, and another pool of 32 addresses towards each of three members: more pairs than a table of
/// 1024 flows has.
fn too_much() -> Generation {
    let wide = Snat::Pool("wide".into());
    let more = ("out", "10.0.1.101:465", wide, &MEMBERS[..]);
    let servers = [("mx", SERVICE, Snat::Automap, &MEMBERS[..]), more];
    let mut next = generation(Method::RoundRobin, &servers);
    next.network.snat_exclude = vec![PortRange {
        first: 1024,
        last: 30_000,
    }];
    let pool = SnatPool {
        name: "wide".into(),
        addresses: (100..132).map(|last| [10, 0, 2, last].into()).collect(),
        ports: None,
        exclude: Vec::new(),
    };
    next.snat_pools.insert("wide".into(), Arc::new(pool));
    next
}

/// Where the flows of these ports of the client come from.
fn sources(rig: &mut Rig, ports: std::ops::Range<u16>) -> BTreeSet<IpAddr> {
    for port in ports.clone() {
        let client = ([10, 0, 1, 2], port).into();
        let service = SERVICE.parse().expect("an address");
        let (outcome, _) = rig.send(&Packet::new(client, service, SYN).bytes(), "c0");
        assert_eq!(outcome, Outcome::Sent);
    }
    let flows = rig.plane.flows().into_iter();
    flows
        .filter(|flow| ports.contains(&u16::from_be(flow.route.client().1)))
        .map(|flow| flow.route.snat().0.to_ip())
        .collect()
}

#[test]
fn what_does_not_fit_leaves_the_generation_in_use_alone() {
    let servers = [("mx", SERVICE, Snat::Automap, &MEMBERS[..])];
    let first = || generation(Method::RoundRobin, &servers);
    Rig::each("unfit", first, 1024, |rig| {
        let usable = |rig: &Rig| -> Vec<u32> {
            let own = |address: IpAddr| address == IpAddr::from([10, 0, 2, 1]);
            let pairs = rig.plane.ports().into_iter();
            pairs
                .filter(|pair| pair.source.is_some_and(own))
                .map(|pair| pair.usable)
                .collect()
        };
        let before = usable(rig);
        assert_eq!(before.len(), 3);
        assert_eq!(sources(rig, 1000..1003), [[10, 0, 2, 1].into()].into());

        let next = too_much();
        let numbers = rig.plane.number(&next).unwrap();
        let refused = rig.plane.apply(&next, &numbers, |_| true, 1);
        let said = format!("{:#}", refused.expect_err("too many pairs"));
        assert!(said.contains("pairs of SNAT address and member"), "{said}");
        assert_eq!(rig.plane.generation(), 1);
        assert_eq!(usable(rig), before, "ports of the box");

        // A box that gets another address is noticed as ever.
        ip("addr add 10.0.2.5/24 dev s0");
        ip("route replace 10.0.2.0/24 dev s0 src 10.0.2.5");
        for place in 0..MEMBERS.len() {
            let pool = rig.generation.pools["mx"].clone();
            let (number, address) = (rig.member("mx", place), pool.members[place].address);
            rig.plane
                .set_member(number, &pool.name, address, true)
                .unwrap();
        }
        assert_eq!(sources(rig, 2000..2003), [[10, 0, 2, 5].into()].into());
    });
}
