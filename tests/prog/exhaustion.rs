//! As many flows as there are ports, exactly; then refusals by name; then all of them again. And a million held.

use std::{collections::HashSet, ops::Range};

use anyhow::{Result, ensure};
use tests::bench::{
    population::{self, ACK, FIN, From, Population, SYN, packet_of},
    replay::{Ends, Hook, Replay},
};

/// Four addresses with 50,000 ports each, towards one member.
const POOL: &str = "[snat.out]\naddresses = [\"10.0.2.101\", \"10.0.2.102\", \"10.0.2.103\", \"10.0.2.104\"]\n\
                    ports = \"10000-59999\"\n";
const PORTS: u32 = 200_000;
const MORE: u32 = 5_000;

fn refused(site: &mut Population) -> Result<u64> {
    Ok(site.plane()?.drops()["ports-exhausted"])
}

#[test]
fn every_port_is_used_before_a_connection_is_refused_and_comes_back() -> Result<()> {
    population::alone(|| {
        let config = population::config(1, "out", POOL);
        let mut site = Population::new(&config, 1 << 18, PORTS)?;
        let (forward, reverse) = site.open(0..PORTS)?;
        ensure!(
            refused(&mut site)? == 0,
            "refused before every port was used"
        );
        let sources: HashSet<_> = reverse.iter().map(|ends| ends.dst).collect();
        ensure!(
            sources.len() == PORTS as usize,
            "{} different",
            sources.len()
        );

        let late = (PORTS..PORTS + MORE).map(|number| packet_of(number, SYN));
        site.send(late, From::Clients)?;
        ensure!(
            refused(&mut site)? == u64::from(MORE),
            "{} refused of {MORE}",
            refused(&mut site)?
        );
        let left = site.flows()?.len();
        ensure!(left == PORTS as usize, "{left} flows after the refusals");
        site.carry(forward.iter().copied(), From::Clients)?;
        site.carry(reverse.iter().copied(), From::Members)?;

        let ends = |ends: &Ends| Ends {
            flags: FIN | ACK,
            ..*ends
        };
        site.send(forward.iter().map(ends), From::Clients)?;
        site.send(reverse.iter().map(ends), From::Members)?;
        site.open_more(PORTS + MORE..2 * PORTS + MORE)?;
        ensure!(
            refused(&mut site)? == u64::from(MORE),
            "{} refused after every flow had ended",
            refused(&mut site)? - u64::from(MORE)
        );
        let (_, reverse) = site.packets()?;
        let sources: HashSet<_> = reverse.iter().map(|ends| ends.dst).collect();
        ensure!(
            sources.len() == PORTS as usize,
            "{} of {PORTS} ports came back",
            sources.len()
        );
        Ok(())
    })
}

/// Four addresses with 3,000 ports each.
const FEW: u32 = 12_000;
/// Half of one address's: as many may be half-open.
const SHARE: u32 = 1_500;
const THREADS: u32 = 4;
const ROUNDS: u32 = 20;

#[test]
fn processors_at_once_take_every_port_and_refuse_nobody_before() -> Result<()> {
    population::alone(|| {
        let config = population::config(1, "out", &POOL.replace("59999", "12999"));
        let mut site = Population::new(&config, 1 << 18, FEW)?;
        let replays = (0..THREADS).map(|_| Replay::load(FEW.next_power_of_two()));
        let mut replays: Vec<_> = replays.collect::<Result<_>>()?;
        let lists = |numbers: Range<u32>| {
            let of = |thread| {
                let own = numbers.clone().filter(|number| number % THREADS == thread);
                own.map(|number| packet_of(number, SYN)).collect()
            };
            (0..THREADS).map(of).collect()
        };
        let mut refusals = 0;
        for round in 0..ROUNDS {
            let from = round * (FEW + MORE);
            for opened in (0..FEW).step_by(SHARE as usize) {
                let share = from + opened..from + opened + SHARE;
                site.send_at_once(&mut replays, lists(share), From::Clients)?;
                site.establish(SHARE as usize)?;
            }
            let early = refused(&mut site)? - refusals;
            ensure!(
                early == 0,
                "round {round}: {early} refused before every port was used"
            );
            let (forward, reverse) = site.packets()?;
            let sources: HashSet<_> = reverse.iter().map(|ends| ends.dst).collect();
            ensure!(sources.len() == FEW as usize, "{} different", sources.len());

            let late = from + FEW..from + FEW + MORE;
            site.send_at_once(&mut replays, lists(late), From::Clients)?;
            refusals += u64::from(MORE);
            ensure!(refused(&mut site)? == refusals, "round {round}");

            let ends = |ends: &Ends| Ends {
                flags: FIN | ACK,
                ..*ends
            };
            site.send(forward.iter().map(ends), From::Clients)?;
            site.send(reverse.iter().map(ends), From::Members)?;
        }
        Ok(())
    })
}

#[test]
fn a_million_flows_are_held_and_carried_both_ways() -> Result<()> {
    const MILLION: u32 = 1 << 20;
    population::alone(|| {
        let config = population::config(32, "automap", "");
        let mut site = Population::new(&config, MILLION + MILLION / 4, MILLION)?;
        let (forward, reverse) = site.open(0..MILLION)?;
        for (packets, from) in [(forward, From::Clients), (reverse, From::Members)] {
            ensure!(packets.iter().all(|ends| ends.flags == ACK), "flags");
            site.replay.fill(packets.into_iter())?;
            for hook in Hook::ALL {
                let run = site.run(hook, true, MILLION, from)?;
                ensure!(run.verdict == hook.sent(), "{run:?} by {}", hook.name());
            }
        }
        let flows = site.flows()?;
        ensure!(flows.len() == MILLION as usize, "{} flows", flows.len());
        // Two packets opened and established each, and three hooks carried one each way.
        let short = flows.iter().find(|flow| flow.packets != [5, 4]);
        ensure!(short.is_none(), "{short:?}");
        let drops = site.plane()?.drops();
        ensure!(drops.values().sum::<u64>() == 0, "{drops:?}");
        Ok(())
    })
}
