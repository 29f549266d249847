use std::{collections::BTreeMap, sync::atomic::Ordering::Relaxed};

use super::*;

fn pool(method: Method, members: usize) -> LivePool {
    let members = (1..=members)
        .map(|id| {
            let address = SocketAddr::from(([10, 0, 0, id as u8], 25));
            let cell = Box::leak(Box::new(TrafficCell::default()));
            Arc::new(LiveMember::new(
                format!("mx{id}").into(),
                address,
                id as u16,
                true,
                cell,
            ))
        })
        .collect();
    LivePool::new("mx".into(), method, members)
}

/// How often each member is taken in so many turns, each place given back at once.
fn tally(pool: &LivePool, turns: usize) -> BTreeMap<u16, usize> {
    let mut tally = BTreeMap::new();
    for _ in 0..turns {
        *tally
            .entry(pool.select(&[]).unwrap().member().id)
            .or_default() += 1;
    }
    tally
}

fn flows(pool: &LivePool, member: usize, flows: u64) {
    pool.members()[member]
        .counters()
        .flows_active
        .store(flows, Relaxed);
}

#[test]
fn round_robin_is_even_and_in_order() {
    let pool = pool(Method::RoundRobin, 3);
    let order: Vec<_> = (0..7)
        .map(|_| pool.select(&[]).unwrap().member().id)
        .collect();
    assert_eq!(order, [1, 2, 3, 1, 2, 3, 1]);
}

#[test]
fn round_robin_stays_even_beside_a_dead_member() {
    let pool = pool(Method::RoundRobin, 4);
    pool.members()[1].set_up(false);
    assert_eq!(
        tally(&pool, 300),
        BTreeMap::from([(1, 100), (3, 100), (4, 100)])
    );
}

#[test]
fn round_robin_ignores_how_busy_a_member_is() {
    let pool = pool(Method::RoundRobin, 2);
    flows(&pool, 0, 1000);
    assert_eq!(tally(&pool, 10), BTreeMap::from([(1, 5), (2, 5)]));
}

#[test]
fn least_connections_counts_both_planes() {
    let pool = pool(Method::LeastConnections, 3);
    flows(&pool, 0, 5);
    flows(&pool, 2, 2);
    // The second member fills up to the third; from then on the two take turns.
    let leases: Vec<_> = (0..6).map(|_| pool.select(&[]).unwrap()).collect();
    assert!(
        leases.iter().all(|lease| lease.member().id != 1),
        "five flows are the most"
    );
    let active: Vec<_> = pool
        .members()
        .iter()
        .map(|member| member.counters().active())
        .collect();
    assert_eq!(active, [5, 4, 4]);
    flows(&pool, 0, 0);
    assert_eq!(
        pool.select(&[]).unwrap().member().id,
        1,
        "flows that end count at once"
    );
}

#[test]
fn ties_are_spread_evenly() {
    let pool = pool(Method::LeastConnections, 3);
    assert_eq!(
        tally(&pool, 300),
        BTreeMap::from([(1, 100), (2, 100), (3, 100)])
    );
    pool.members()[0].set_up(false);
    assert_eq!(tally(&pool, 300), BTreeMap::from([(2, 150), (3, 150)]));
}

#[test]
fn members_that_are_down_or_tried_are_skipped() {
    for method in [Method::LeastConnections, Method::RoundRobin] {
        let pool = pool(method, 3);
        pool.members()[0].set_up(false);
        for _ in 0..10 {
            assert_eq!(pool.select(&[2]).unwrap().member().id, 3);
        }
        assert!(pool.select(&[2, 3]).is_none(), "none is left");
        pool.members()[0].set_up(true);
        assert_eq!(pool.select(&[2, 3]).unwrap().member().id, 1);
    }
    assert!(
        LivePool::new("empty".into(), Method::RoundRobin, Vec::new())
            .select(&[])
            .is_none()
    );
}

#[test]
fn the_largest_pool_is_used_to_its_last_member() {
    let pool = pool(Method::RoundRobin, POOL_MEMBERS);
    assert_eq!(tally(&pool, POOL_MEMBERS).len(), POOL_MEMBERS);
}

#[test]
fn a_place_is_given_back_with_its_lease() {
    let pool = pool(Method::LeastConnections, 1);
    let counters = pool.members()[0].counters();
    let first = pool.select(&[]).unwrap();
    let second = pool.select(&[]).unwrap();
    assert_eq!((counters.active(), counters.total()), (2, 2));
    first.count_bytes(10, 20);
    drop(first);
    assert_eq!(counters.active(), 1);
    drop(second);
    assert_eq!((counters.active(), counters.total()), (0, 2));
    assert_eq!(counters.session_bytes_in.load(Relaxed), 10);
    assert_eq!(counters.session_bytes_out.load(Relaxed), 20);
}

#[test]
fn a_state_is_news_once() {
    let pool = pool(Method::RoundRobin, 1);
    let member = &pool.members()[0];
    assert!(
        !member.set_up(true) && member.set_up(false) && !member.set_up(false) && !member.is_up()
    );
}
