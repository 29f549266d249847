//! What was sent against what arrived.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use anyhow::{Result, ensure};

use crate::{client::Outcome, sink::Arrival};

/// The balance of a run; each list names message ids.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Balance {
    /// Messages that clients wanted to send.
    pub sent: usize,
    /// Messages that are with a member exactly once, every byte as it was sent.
    pub intact: usize,
    /// Not taken, or said to be taken and nowhere to be found.
    pub lost: Vec<String>,
    /// Arrived with other bytes.
    pub altered: Vec<String>,
    /// More often with the members than they were sent.
    pub doubled: Vec<String>,
    /// Arrived, but nobody sent them.
    pub foreign: Vec<String>,
    /// Sent again because the answer to an earlier attempt never came; such a message may rightly be there twice
    /// (RFC 5321 §4.5.4.1, §6.1).
    pub resent: usize,
}

impl Balance {
    /// Compares.
    pub fn of(outcomes: &[Outcome], arrivals: &[Arrival]) -> Self {
        let mut by_id: BTreeMap<&str, Vec<&Arrival>> = BTreeMap::new();
        for arrival in arrivals {
            by_id
                .entry(arrival.id.as_deref().unwrap_or("none"))
                .or_default()
                .push(arrival);
        }
        let mut balance = Self {
            sent: outcomes.len(),
            ..Self::default()
        };
        let mut known = BTreeSet::new();
        for outcome in outcomes {
            known.insert(outcome.id.as_str());
            balance.resent += usize::from(outcome.attempts > 1);
            let copies = by_id
                .get(outcome.id.as_str())
                .map_or(&[][..], Vec::as_slice);
            if !outcome.ok || copies.is_empty() {
                balance.lost.push(outcome.id.clone());
            } else if !copies.iter().all(|copy| is_same(outcome, copy)) {
                balance.altered.push(outcome.id.clone());
            } else if copies.len() > usize::try_from(outcome.attempts).unwrap_or(usize::MAX) {
                balance.doubled.push(outcome.id.clone());
            } else {
                balance.intact += 1;
            }
        }
        balance.foreign = by_id
            .keys()
            .filter(|id| !known.contains(*id))
            .map(|id| (*id).to_owned())
            .collect();
        balance
    }

    /// Whether nothing is lost, altered, doubled or foreign.
    pub fn is_even(&self) -> bool {
        self.intact == self.sent && self.foreign.is_empty()
    }

    /// # Errors
    /// When it is not even; says what is wrong.
    pub fn check(&self) -> Result<()> {
        ensure!(self.is_even(), "{self}");
        Ok(())
    }
}

/// Where a server added header lines of its own, only the bodies can be compared.
fn is_same(sent: &Outcome, arrived: &Arrival) -> bool {
    match &arrived.sha256 {
        Some(whole) => *whole == sent.sha256 && arrived.size == sent.size,
        None => arrived.body_sha256 == sent.body_sha256,
    }
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} sent, {} arrived once and intact",
            self.sent, self.intact
        )?;
        for (what, ids) in [
            ("lost", &self.lost),
            ("altered", &self.altered),
            ("doubled", &self.doubled),
            ("foreign", &self.foreign),
        ] {
            if !ids.is_empty() {
                let some: Vec<_> = ids.iter().take(5).map(String::as_str).collect();
                write!(f, ", {} {what} ({})", ids.len(), some.join(" "))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(id: &str, ok: bool, attempts: u32) -> Outcome {
        Outcome {
            id: id.to_owned(),
            size: 3,
            sha256: format!("{id}!"),
            body_sha256: String::new(),
            ok,
            reply: String::new(),
            attempts,
            tls: None,
            certificate: None,
            greeting: String::new(),
        }
    }

    fn arrival(id: &str, sha256: &str) -> Arrival {
        Arrival {
            member: "m1".to_owned(),
            port: 25,
            peer: None,
            tls: None,
            helo: String::new(),
            from: String::new(),
            to: Vec::new(),
            id: Some(id.to_owned()),
            size: 3,
            sha256: Some(sha256.to_owned()),
            body_sha256: String::new(),
        }
    }

    #[test]
    fn every_kind_of_mishap_has_its_place() {
        let outcomes = [
            outcome("fine", true, 1),
            outcome("lost", true, 1),
            outcome("refused", false, 3),
            outcome("altered", true, 1),
            outcome("doubled", true, 1),
            outcome("resent", true, 2),
        ];
        let arrivals = [
            arrival("fine", "fine!"),
            arrival("altered", "?"),
            arrival("doubled", "doubled!"),
            arrival("doubled", "doubled!"),
            arrival("resent", "resent!"),
            arrival("resent", "resent!"),
            arrival("foreign", "?"),
        ];
        let balance = Balance::of(&outcomes, &arrivals);
        assert_eq!(balance.intact, 2);
        assert_eq!(balance.lost, ["lost", "refused"]);
        assert_eq!(balance.altered, ["altered"]);
        assert_eq!(balance.doubled, ["doubled"]);
        assert_eq!(balance.foreign, ["foreign"]);
        assert!(balance.check().is_err());
    }
}
