//! The short variants of `cargo xtask test soak`.

use std::time::Duration;

use anyhow::Result;
use tests::{
    crowd::{self, Crowd},
    flood::{self, Flooding},
    soak::{self, Soak},
};

#[test]
fn no_disturbance_harms_a_connection() -> Result<()> {
    soak::disturb(Soak {
        time: Duration::from_secs(15),
        rate: 300,
        held: 50,
    })
}

#[test]
fn idle_sessions_are_held_while_others_come_and_go() -> Result<()> {
    crowd::endure(Crowd {
        idle: 400,
        rate: 50,
        time: Duration::from_secs(10),
    })
}

#[test]
fn a_flood_harms_no_flow_by_tc() -> Result<()> {
    flood::endure(Flooding::SHORT, "tc")
}

#[test]
fn a_flood_leaves_ports_where_they_are_few() -> Result<()> {
    flood::endure(Flooding::FEW_PORTS, "tc")
}

#[test]
fn a_flood_harms_no_flow_by_xdp() -> Result<()> {
    flood::endure(Flooding::SHORT, "xdp")
}
