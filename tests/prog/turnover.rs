//! SNAT addresses that come and go: what nothing needs any more holds nothing up, and flows go on from theirs.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use lb_userspace::{
    dataplane::KernelPlane,
    model::{Generation, Method, PortRange, Snat, SnatPool},
};

use crate::{
    packet::{ACK, Packet, SYN},
    rig::{Outcome, Rig, generation},
};

const SERVICE: &str = "10.0.1.100:465";
const MEMBERS: [&str; 3] = ["10.0.2.11:465", "10.0.2.12:465", "10.0.2.13:465"];
/// As many as a table of 1024 flows has, less number 0.
const PAIRS: usize = 63;

/// A virtual server whose flows come from these addresses and ports.
fn from(addresses: &[IpAddr], ports: (u16, u16)) -> Generation {
    let snat = Snat::Pool("out".into());
    let mut next = generation(Method::RoundRobin, &[("mx", SERVICE, snat, &MEMBERS)]);
    let pool = SnatPool {
        name: "out".into(),
        addresses: addresses.to_vec(),
        ports: Some(PortRange {
            first: ports.0,
            last: ports.1,
        }),
        exclude: Vec::new(),
    };
    next.snat_pools.insert("out".into(), Arc::new(pool));
    next
}

fn automap() -> Generation {
    generation(
        Method::RoundRobin,
        &[("mx", SERVICE, Snat::Automap, &MEMBERS)],
    )
}

fn client(rig: &mut Rig, port: u16, flags: u8) -> Outcome {
    let client = ([10, 0, 1, 2], port).into();
    let service = SERVICE.parse().expect("an address");
    rig.send(&Packet::new(client, service, flags).bytes(), "c0")
        .0
}

/// A packet of the flow of a client's port, from its member.
fn member(rig: &mut Rig, port: u16, flags: u8) -> Outcome {
    let flows = rig.plane.flows().into_iter();
    let flow = flows
        .rev()
        .find(|flow| u16::from_be(flow.route.client().1) == port)
        .expect("the flow");
    let [from, to] = [flow.route.member(), flow.route.snat()]
        .map(|(address, port)| address.to_socket_addr(port));
    rig.send(&Packet::new(from, to, flags).bytes(), "s0").0
}

/// The SNAT addresses that the readings name.
fn named(rig: &Rig) -> BTreeSet<IpAddr> {
    let pairs = rig.plane.ports().into_iter();
    pairs.filter_map(|pair| pair.source).collect()
}

#[test]
fn a_small_pool_that_is_gone_limits_half_open_flows_no_more() {
    const SMALL: [IpAddr; 1] = [IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 2, 100))];
    Rig::each(
        "small-pool",
        || from(&SMALL, (5000, 5009)),
        1024,
        |rig| {
            for port in 1000..1020 {
                assert_eq!(client(rig, port, SYN), Outcome::Sent);
            }
            let half_open = rig.plane.flows().len();
            assert_eq!(half_open, 5, "half of 10 ports; the others got cookies");
            rig.apply(automap());
            for port in 2000..2020 {
                assert_eq!(client(rig, port, SYN), Outcome::Sent);
            }
            assert_eq!(rig.plane.flows().len(), half_open + 20);
            // They came from the small pool, and still do.
            assert_eq!(member(rig, 1000, SYN | ACK), Outcome::Sent);
            assert_eq!(client(rig, 1000, ACK), Outcome::Sent);
        },
    );
}

#[test]
fn addresses_may_change_more_often_than_there_are_pairs() {
    let turn = |turn: u8| {
        let addresses = [1, 2, 3, 4].map(|place| IpAddr::from([10, 0, 3 + turn, place]));
        from(&addresses, (10_000, 20_000))
    };
    Rig::each(
        "turnover",
        || turn(0),
        1024,
        |rig| {
            let count = turn(0).snat_pools["out"].addresses.len() * MEMBERS.len();
            assert_eq!(client(rig, 1000, SYN), Outcome::Sent);
            assert_eq!(member(rig, 1000, SYN | ACK), Outcome::Sent);
            let oldest = named_of_flow(rig);
            // In the second half two daemons in turn, as restarts have it: each finds what the other has left.
            let mut other = KernelPlane::load(rig.bpffs(), 1024, false).unwrap();
            let turns = 3 * (PAIRS / count) as u8;
            for number in 1..=turns {
                let next = turn(number);
                if number > turns / 2 && number % 3 == 0 {
                    let numbers = other.number(&next).unwrap();
                    other
                        .apply(&next, &numbers, |_| true, 1)
                        .unwrap_or_else(|error| panic!("turn {number}: {error:#}"));
                } else {
                    rig.apply(next);
                }
                // Fewer than there are chunks: each is bound to an address of its own.
                let port = 2000 + u16::from(number / 2);
                if number % 2 == 0 {
                    assert_eq!(client(rig, port, SYN), Outcome::Sent);
                }
                for port in [1000, port].into_iter().filter(|port| *port != 2000) {
                    assert_eq!(member(rig, port, ACK), Outcome::Sent, "turn {number}");
                    assert_eq!(client(rig, port, ACK), Outcome::Sent, "turn {number}");
                }
            }
            rig.apply(turn(turns + 1));
            let named = named(rig);
            let flows = rig.plane.flows().into_iter();
            let carried: BTreeSet<IpAddr> = flows.map(|flow| flow.route.snat().0.to_ip()).collect();
            assert!(carried.contains(&oldest), "{carried:?}");
            let wanted = &turn(turns + 1).snat_pools["out"].addresses;
            let expected: BTreeSet<IpAddr> = carried.iter().chain(wanted).copied().collect();
            assert_eq!(named, expected, "addresses that nothing comes from");
        },
    );
}

/// Where the only flow comes from.
fn named_of_flow(rig: &Rig) -> IpAddr {
    let flows = rig.plane.flows();
    assert_eq!(flows.len(), 1);
    flows[0].route.snat().0.to_ip()
}
