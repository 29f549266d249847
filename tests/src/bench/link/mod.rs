//! `cargo xtask bench link`: connections and bytes end to end in namespaces, beside nftables and HAProxy.
//!
//! Clients, box and members share the processors, so the rate alone says little: what a gigabyte costs all of them
//! together, interrupts included, is the figure to compare. Every contender has a lab of its own and is measured once
//! in each round, so that what else the machine does meets all of them.

mod contender;
mod load;

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use self::{
    contender::{Contender, Kind, PORT},
    load::Way,
};
use super::{Machine, Spread};
use crate::lab::{Lab, VIRTUAL};

/// Threads that connect.
const CONNECTORS: usize = 4;
/// What every ratio is to.
const REFERENCE: Kind = Kind::Nftables;

/// How much to measure.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Options {
    /// Rounds, in each of which everything is measured once
    #[arg(long, default_value_t = 5)]
    pub rounds: u32,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 2)]
    pub seconds: u32,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What is measured of every contender.
const MEASURES: [Measure; 5] = [
    Measure::Connections,
    Measure::Stream(Way::Up, 1),
    Measure::Stream(Way::Down, 1),
    Measure::Stream(Way::Up, 4),
    Measure::Stream(Way::Down, 4),
];

#[derive(Debug, Clone, Copy)]
enum Measure {
    Connections,
    Stream(Way, usize),
}

impl Measure {
    /// What its figures are called, with their units.
    const fn figures(self) -> &'static [&'static str] {
        match self {
            Self::Connections => &["connections/s", "connections per CPU second"],
            Self::Stream(Way::Up, 1) => &["up, 1 flow: Gbit/s", "up, 1 flow: GB per CPU second"],
            Self::Stream(Way::Down, 1) => {
                &["down, 1 flow: Gbit/s", "down, 1 flow: GB per CPU second"]
            }
            Self::Stream(Way::Up, _) => &["up, 4 flows: Gbit/s", "up, 4 flows: GB per CPU second"],
            Self::Stream(Way::Down, _) => {
                &["down, 4 flows: Gbit/s", "down, 4 flows: GB per CPU second"]
            }
        }
    }
}

/// One figure of one contender.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// What, and its unit.
    pub figure: &'static str,
    /// Whose.
    pub contender: &'static str,
    /// The value.
    pub value: Spread,
    /// By that of nftables in the same round.
    pub ratio: Spread,
}

/// Everything.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Where and when.
    pub machine: Machine,
    /// Rounds.
    pub rounds: u32,
    /// By figure and contender.
    pub figures: Vec<Figure>,
}

impl Report {
    /// For people.
    pub fn text(&self) -> String {
        let mut text = format!(
            "{}; {} rounds: median (lowest–highest); ratio to {} in the same round\n",
            self.machine.text(),
            self.rounds,
            REFERENCE.name()
        );
        let mut last = "";
        for figure in &self.figures {
            if figure.figure != last {
                text.push_str(&format!("\n{}\n", figure.figure));
                last = figure.figure;
            }
            let digits = if figure.value.median < 100.0 { 2 } else { 0 };
            text.push_str(&format!(
                "  {:<12} {:>26} {:>20}\n",
                figure.contender,
                figure.value.text(digits),
                figure.ratio.text(2)
            ));
        }
        text
    }
}

/// Measures everything.
///
/// # Errors
/// When this is not root, a contender does not start, or a connection fails: then no figure would mean anything.
pub fn run(options: Options) -> Result<Report> {
    let machine = Machine::this();
    let time = Duration::from_secs(u64::from(options.seconds));
    let labs = Kind::ALL
        .map(|kind| Ok((kind, Lab::build(kind.plan())?)))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let _contenders = labs
        .iter()
        .map(|(kind, lab)| Contender::start(*kind, lab).with_context(|| kind.name()))
        .collect::<Result<Vec<_>>>()?;
    // The first connection asks for neighbours.
    for (kind, lab) in &labs {
        measure(*kind, lab, Measure::Connections, Duration::from_millis(200))?;
    }

    let mut figures = Vec::new();
    for what in MEASURES {
        let mut rounds: Vec<Vec<Vec<f64>>> = Vec::new();
        for _ in 0..options.rounds {
            let round = labs
                .iter()
                .map(|(kind, lab)| measure(*kind, lab, what, time));
            rounds.push(round.collect::<Result<_>>()?);
        }
        let reference = labs.iter().position(|(kind, _)| *kind == REFERENCE);
        let reference = reference.context("nothing to compare with")?;
        for (number, figure) in what.figures().iter().enumerate() {
            for (place, (kind, _)) in labs.iter().enumerate() {
                let of = |place: usize| rounds.iter().map(move |round| round[place][number]);
                figures.push(Figure {
                    figure,
                    contender: kind.name(),
                    value: Spread::of(of(place)),
                    ratio: Spread::of(of(place).zip(of(reference)).map(|(own, other)| own / other)),
                });
            }
        }
    }
    Ok(Report {
        machine,
        rounds: options.rounds,
        figures,
    })
}

/// Values in the order of [`Measure::figures`].
fn measure(kind: Kind, lab: &Lab, what: Measure, time: Duration) -> Result<Vec<f64>> {
    let address: IpAddr = match kind {
        Kind::Routed => lab.members[0].v4.into(),
        _ => VIRTUAL.0.into(),
    };
    let server = SocketAddr::new(address, PORT);
    let client = &lab.clients[0].namespace;
    let carried = || -> Result<Vec<f64>> {
        match what {
            Measure::Connections => {
                let (rate, busy) = load::connections(client, server, CONNECTORS, time)?;
                ensure!(busy > 0.0, "no time has passed");
                Ok(vec![rate, rate / busy])
            }
            Measure::Stream(way, flows) => {
                let (rate, busy) = load::stream(client, server, way, flows, time)?;
                ensure!(busy > 0.0, "no time has passed");
                Ok(vec![rate * 8.0 / 1e9, rate / 1e9 / busy])
            }
        }
    };
    carried().with_context(|| format!("{} with {what:?}", kind.name()))
}
