//! Choice of members, counters, phases and the end of flows.

use std::{net::SocketAddr, sync::atomic::Ordering::Relaxed};

use lb_common::{addr::Addr, tcp::Phase};
use lb_userspace::{
    dataplane::FlowSnapshot,
    model::{Generation, Method, Snat},
};

use crate::{
    packet::{ACK, FIN, Packet, RST, SYN},
    rig::{Outcome, Rig, generation},
};

const SERVICE: &str = "10.0.1.100:465";
const MEMBERS: [&str; 3] = ["10.0.2.11:465", "10.0.2.12:465", "10.0.2.13:465"];

fn pool_of_three(method: Method) -> Generation {
    generation(method, &[("mx", SERVICE, Snat::Automap, &MEMBERS)])
}

fn client(port: u16) -> SocketAddr {
    SocketAddr::new("10.0.1.2".parse().expect("an address"), port)
}

fn service() -> SocketAddr {
    SERVICE.parse().expect("an address")
}

fn socket((address, port): (Addr, u16)) -> SocketAddr {
    address.to_socket_addr(port)
}

fn syn(rig: &mut Rig, port: u16) -> Outcome {
    rig.send(&Packet::new(client(port), service(), SYN).bytes(), "c0")
        .0
}

/// A packet of the flow that a client's port has opened, from the member's side.
fn reply(rig: &mut Rig, port: u16, flags: u8) -> Outcome {
    let flow = rig
        .plane
        .flows()
        .into_iter()
        .find(|flow| u16::from_be(flow.route.client().1) == port)
        .expect("the flow");
    let member = socket(flow.route.member());
    let snat = socket(flow.route.snat());
    rig.send(&Packet::new(member, snat, flags).bytes(), "s0").0
}

fn active(rig: &Rig) -> Vec<u64> {
    (0..3)
        .map(|place| {
            rig.plane
                .member_cell(rig.member("mx", place))
                .flows_active
                .load(Relaxed)
        })
        .collect()
}

fn phase(rig: &Rig, port: u16) -> Option<Phase> {
    rig.plane
        .flows()
        .iter()
        .find(|flow| u16::from_be(flow.route.client().1) == port)
        .map(|flow| flow.phase)
}

#[test]
fn least_connections_fills_the_idle_member() {
    Rig::each(
        "least",
        || pool_of_three(Method::LeastConnections),
        1024,
        |rig| {
            for port in 1000..1030 {
                assert_eq!(syn(rig, port), Outcome::Sent);
            }
            assert_eq!(active(rig), [10, 10, 10]);
            let busy = rig.member("mx", 0);
            rig.plane
                .member_cell(busy)
                .sessions_active
                .store(100, Relaxed);
            for port in 2000..2010 {
                assert_eq!(syn(rig, port), Outcome::Sent);
            }
            assert_eq!(
                active(rig),
                [10, 15, 15],
                "sessions of the proxy plane count too"
            );
        },
    );
}

#[test]
fn round_robin_goes_round() {
    Rig::each(
        "round",
        || pool_of_three(Method::RoundRobin),
        1024,
        |rig| {
            for port in 1000..1030 {
                assert_eq!(syn(rig, port), Outcome::Sent);
            }
            assert_eq!(active(rig), [10, 10, 10]);
        },
    );
}

#[test]
fn a_member_that_is_down_gets_no_new_flow_and_keeps_its_old_ones() {
    Rig::each(
        "down",
        || pool_of_three(Method::LeastConnections),
        1024,
        |rig| {
            for port in 1000..1003 {
                assert_eq!(syn(rig, port), Outcome::Sent);
            }
            let (number, pool) = (rig.member("mx", 1), rig.generation.pools["mx"].clone());
            rig.plane
                .set_member(number, &pool.name, pool.members[1].address, false)
                .unwrap();
            for port in 2000..2010 {
                assert_eq!(syn(rig, port), Outcome::Sent);
            }
            assert_eq!(active(rig), [6, 1, 6]);
            for port in 1000..1003 {
                assert_eq!(reply(rig, port, SYN | ACK), Outcome::Sent);
            }
        },
    );
}

#[test]
fn phases_follow_the_packets_and_the_end_is_counted_once() {
    Rig::each(
        "phases",
        || pool_of_three(Method::LeastConnections),
        1024,
        |rig| {
            syn(rig, 1000);
            assert_eq!(
                syn(rig, 1000),
                Outcome::Sent,
                "a repeated SYN follows the first"
            );
            assert_eq!(rig.plane.flows().len(), 1);
            assert_eq!(phase(rig, 1000), Some(Phase::Syn));
            reply(rig, 1000, SYN | ACK);
            let from_client = |rig: &mut Rig, flags| {
                rig.send(&Packet::new(client(1000), service(), flags).bytes(), "c0")
                    .0
            };
            from_client(rig, ACK);
            assert_eq!(phase(rig, 1000), Some(Phase::Established));
            from_client(rig, FIN | ACK);
            assert_eq!(phase(rig, 1000), Some(Phase::FinClient));
            assert_eq!(active(rig).iter().sum::<u64>(), 1);
            reply(rig, 1000, FIN | ACK);
            assert_eq!(phase(rig, 1000), Some(Phase::Closing));
            assert_eq!(active(rig).iter().sum::<u64>(), 0);
            assert_eq!(
                from_client(rig, ACK),
                Outcome::Sent,
                "the last acknowledgement still passes"
            );
            assert_eq!(from_client(rig, RST), Outcome::Sent);
            assert_eq!(active(rig).iter().sum::<u64>(), 0);
            let flow = rig.plane.flows()[0];
            assert_eq!(flow.packets, [6, 2]);
            assert_eq!(flow.bytes, [240, 80]);
        },
    );
}

#[test]
fn a_client_may_use_its_port_again() {
    Rig::each(
        "again",
        || pool_of_three(Method::LeastConnections),
        1024,
        |rig| {
            for _ in 0..50 {
                assert_eq!(syn(rig, 1000), Outcome::Sent);
                assert_eq!(reply(rig, 1000, RST), Outcome::Sent);
            }
            assert_eq!(rig.plane.flows().len(), 1);
            assert_eq!(active(rig), [0, 0, 0]);
            let total: u64 = (0..3)
                .map(|place| {
                    rig.plane
                        .member_cell(rig.member("mx", place))
                        .flows_total
                        .load(Relaxed)
                })
                .sum();
            assert_eq!(total, 50);
        },
    );
}

#[test]
fn a_full_table_refuses_new_flows_and_keeps_established_ones() {
    Rig::each(
        "full",
        || pool_of_three(Method::LeastConnections),
        192,
        |rig| {
            // Equal parts for three members, in whole chunks of 64.
            let fits = rig.plane.flows_max() as u16;
            assert_eq!(fits, 192);
            for port in 0..fits {
                assert_eq!(syn(rig, 1000 + port), Outcome::Sent);
                assert_eq!(reply(rig, 1000 + port, SYN | ACK), Outcome::Sent);
                let ack = Packet::new(client(1000 + port), service(), ACK).bytes();
                assert_eq!(rig.send(&ack, "c0").0, Outcome::Sent);
            }
            for port in 0..50 {
                assert_eq!(syn(rig, 5000 + port), Outcome::Dropped);
            }
            assert_eq!(rig.drops("flow-table-full"), 50);
            for port in 0..fits {
                assert_eq!(phase(rig, 1000 + port), Some(Phase::Established));
                assert_eq!(reply(rig, 1000 + port, ACK), Outcome::Sent);
            }
        },
    );
}

#[test]
fn an_ended_flow_goes_back_to_the_table() {
    Rig::each(
        "sweep",
        || pool_of_three(Method::LeastConnections),
        192,
        |rig| {
            for port in 1000..1040 {
                syn(rig, port);
                reply(rig, port, RST);
            }
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
            while !rig.plane.flows().is_empty() {
                assert!(
                    std::time::Instant::now() < deadline,
                    "{:?}",
                    rig.plane.flows()
                );
                rig.plane.sweep().unwrap();
            }
            for port in 1000..1060 {
                assert_eq!(syn(rig, port), Outcome::Sent);
            }
            let carried: u64 = (0..3)
                .map(|place| {
                    rig.plane
                        .member_cell(rig.member("mx", place))
                        .flow_packets_out
                        .load(Relaxed)
                })
                .sum();
            assert_eq!(
                carried, 40,
                "what an ended flow carried stays in the totals"
            );
        },
    );
}

#[test]
fn a_new_generation_takes_new_flows_and_leaves_old_ones() {
    Rig::each(
        "flip",
        || pool_of_three(Method::LeastConnections),
        1024,
        |rig| {
            syn(rig, 1000);
            let next = generation(
                Method::LeastConnections,
                &[("mx", SERVICE, Snat::Automap, &["10.0.2.14:465"])],
            );
            for _ in 0..3 {
                let numbers = rig.plane.number(&next).unwrap();
                rig.plane.apply(&next, &numbers, |_| true, 1).unwrap();
            }
            assert_eq!(rig.plane.generation(), 4);
            syn(rig, 2000);
            let members: Vec<_> = rig
                .plane
                .flows()
                .iter()
                .map(|flow| flow.route.member().0.to_ip())
                .collect();
            assert!(members.contains(&"10.0.2.14".parse().unwrap()));
            assert_eq!(
                reply(rig, 1000, SYN | ACK),
                Outcome::Sent,
                "the old flow goes on"
            );
            let nothing = generation(Method::LeastConnections, &[]);
            let numbers = rig.plane.number(&nothing).unwrap();
            rig.plane.apply(&nothing, &numbers, |_| true, 1).unwrap();
            assert_eq!(
                syn(rig, 3000),
                Outcome::Passed,
                "the virtual server is gone"
            );
            assert_eq!(reply(rig, 1000, ACK), Outcome::Sent);
        },
    );
}

#[test]
fn only_flows_that_are_ended_are_told_of() {
    let one = || {
        generation(
            Method::RoundRobin,
            &[("mx", SERVICE, Snat::Automap, &MEMBERS[..1])],
        )
    };
    Rig::each("ends", one, 1024, |rig| {
        for port in 1000..1003 {
            syn(rig, port);
        }
        let mut flows = rig.plane.flows();
        // As if its record had gone to another flow since it was looked at.
        flows[1].created = flows[1].created.wrapping_add(1);
        let member = rig.member("mx", 0);
        let cause = lb_common::event::Cause::Drained;
        let slots =
            |flows: &[FlowSnapshot]| -> Vec<u32> { flows.iter().map(|it| it.slot).collect() };
        let ended = rig.plane.release_flows(member, &flows, cause).unwrap();
        assert_eq!(slots(&ended), [flows[0].slot, flows[2].slot]);
        assert_eq!(slots(&rig.plane.flows()), [flows[1].slot]);
        let again = rig.plane.release_flows(member, &flows, cause).unwrap();
        assert!(again.is_empty(), "{again:?}");
    });
}
