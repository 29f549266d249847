//! The same packets through smtplb and through nftables NAT.

use anyhow::{Result, ensure};
use tests::twin::{Boxes, Spice, UNANSWERED, run};

/// Everything at once.
const ALL: Spice = Spice {
    fragments: true,
    errors: true,
    extensions: true,
    expiring: true,
    oversized: true,
    damage: true,
};

/// `SMTPLB_DIFF_PACKETS` and `SMTPLB_DIFF_SEED` make the run longer, or another one.
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn compare(attach: &str, snat: bool) -> Result<()> {
    let packets = number("SMTPLB_DIFF_PACKETS").unwrap_or(20_000);
    let seed = number("SMTPLB_DIFF_SEED").unwrap_or(1);
    let mut boxes = Boxes::build_with(attach, "", snat)?;
    let report = run(&mut boxes, seed, packets, ALL)?;
    println!(
        "{attach}: seed {seed}, {} packets, alike {:?}, explained {:?}, different {:#?}",
        report.packets, report.alike, report.explained, report.different
    );
    for example in &report.examples {
        println!("{example}");
    }
    let mut drops = boxes.plane.drops();
    drops.retain(|_, count| *count > 0);
    println!("not carried: {drops:?}");
    let unanswered = report.explained.get(UNANSWERED).copied().unwrap_or(0);
    ensure!(
        drops.get("no-answer").copied().unwrap_or(0) == unanswered,
        "{unanswered} errors not sent, and not all for the limit"
    );
    ensure!(report.different.is_empty(), "differences with seed {seed}");
    for kind in ["segment", "fragments", "error-translated", "error-made"] {
        let seen = report.alike.get(kind).copied().unwrap_or(0);
        ensure!(seen > packets / 200, "only {seen} of kind {kind}");
    }
    Ok(())
}

#[test]
fn tc_translates_as_nftables_does() -> Result<()> {
    compare("tc", true)
}

#[test]
fn xdp_translates_as_nftables_does() -> Result<()> {
    compare("xdp", true)
}

#[test]
fn generic_xdp_translates_as_nftables_does() -> Result<()> {
    compare("xdp-generic", true)
}

#[test]
fn without_snat_tc_translates_as_nftables_does() -> Result<()> {
    compare("tc", false)
}

#[test]
fn without_snat_xdp_translates_as_nftables_does() -> Result<()> {
    compare("xdp", false)
}
