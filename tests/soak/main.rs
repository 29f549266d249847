//! Minutes of what must harm nobody: `cargo xtask test soak`. The normal suite has a short variant of each.

use std::time::Duration;

use anyhow::Result;
use tests::{
    crowd::{self, Crowd},
    flood::{self, Flooding},
    soak::{self, Soak},
};

/// `SMTPLB_SOAK_MINUTES`, 10 without it.
fn minutes() -> u64 {
    let said = std::env::var("SMTPLB_SOAK_MINUTES").ok();
    said.and_then(|said| said.parse().ok()).unwrap_or(10)
}

#[test]
fn no_disturbance_harms_a_connection() -> Result<()> {
    soak::disturb(Soak {
        time: Duration::from_mins(minutes()),
        rate: 1_000,
        held: 200,
    })
}

/// `cargo xtask test soak sessions`
#[test]
fn idle_sessions_are_held_while_others_come_and_go() -> Result<()> {
    crowd::endure(Crowd {
        idle: 10_000,
        rate: 500,
        time: Duration::from_mins(minutes().min(5)),
    })
}

#[test]
fn a_flood_for_a_minute_harms_no_flow_by_tc() -> Result<()> {
    flood::endure(Flooding::MINUTE, "tc")
}

#[test]
fn a_flood_for_a_minute_harms_no_flow_by_xdp() -> Result<()> {
    flood::endure(Flooding::MINUTE, "xdp")
}
