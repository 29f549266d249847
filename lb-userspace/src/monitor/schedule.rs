//! When to probe, and when a row of results turns a member. Pure: time is an argument.

use std::time::{Duration, Instant};

use crate::model::Monitor;

/// The probes of one member.
#[derive(Debug)]
pub struct Schedule {
    interval: Duration,
    rise: u32,
    fall: u32,
    due: Instant,
    /// How much sooner than an interval the second probe comes; zero once it has been used.
    spread: Duration,
    /// Nothing until the first result.
    up: Option<bool>,
    /// Results in a row that contradict the state.
    against: u32,
}

impl Schedule {
    /// Probes at once, then every interval.
    ///
    /// The second probe comes up to a quarter of an interval sooner, by `seed`: members that start together do
    /// not stay in step, and no gap is longer than the interval.
    pub fn new(monitor: &Monitor, seed: u64, now: Instant) -> Self {
        // 1/1024 steps: fine enough to spread the members of the largest box.
        let share = u32::try_from(seed % 1024).unwrap_or_default();
        Self {
            interval: monitor.interval,
            rise: monitor.rise,
            fall: monitor.fall,
            due: now,
            spread: monitor.interval / 4 * share / 1024,
            up: None,
            against: 0,
        }
    }

    /// Goes on from what is known: the first result is one in a row like any other.
    #[must_use]
    pub fn knowing(self, up: Option<bool>) -> Self {
        Self { up, ..self }
    }

    /// When the next probe starts; not before the one before it has [`ended`](Self::ended).
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Takes a probe's result, and says whether the member is up.
    ///
    /// The first result decides alone: there is no earlier state to defend.
    pub fn ended(&mut self, good: bool, now: Instant) -> bool {
        self.due += self.interval - std::mem::take(&mut self.spread);
        if self.due < now {
            // The probe outlasted its interval: the beats it covered are lost, the rhythm stays.
            let beat = self.interval.as_nanos().max(1);
            let late = (now - self.due).as_nanos() % beat;
            let wait = Duration::from_nanos(u64::try_from(beat - late).unwrap_or(u64::MAX));
            self.due = now + wait.min(self.interval);
        }
        let up = *self.up.get_or_insert(good);
        if good == up {
            self.against = 0;
            return up;
        }
        self.against += 1;
        if self.against < if up { self.fall } else { self.rise } {
            return up;
        }
        self.against = 0;
        self.up = Some(good);
        good
    }
}

/// A number of its own for each member, the same in every run.
pub fn seed(words: &[&str]) -> u64 {
    // FNV-1a; a separator keeps ("a", "bc") and ("ab", "c") apart.
    let bytes = words.iter().flat_map(|word| word.bytes().chain([0]));
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    // The low bits of FNV are its weakest.
    hash ^ hash >> 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Probe;

    const INTERVAL: Duration = Duration::from_secs(30);

    fn monitor(rise: u32, fall: u32) -> Monitor {
        let timeout = Duration::from_secs(91);
        Monitor {
            name: "m".into(),
            probe: Probe::Tcp,
            interval: INTERVAL,
            timeout,
            rise,
            fall,
        }
    }

    /// Feeds results (`+` good, `-` bad) and writes down the state after each (`U` up, `D` down).
    fn states(rise: u32, fall: u32, results: &str) -> String {
        let now = Instant::now();
        let mut schedule = Schedule::new(&monitor(rise, fall), 0, now);
        results
            .chars()
            .map(|result| {
                if schedule.ended(result == '+', now) {
                    'U'
                } else {
                    'D'
                }
            })
            .collect()
    }

    #[test]
    fn the_first_result_decides_alone() {
        assert_eq!(states(5, 5, "+"), "U");
        assert_eq!(states(5, 5, "-"), "D");
    }

    #[test]
    fn what_is_known_is_defended() {
        let now = Instant::now();
        let mut schedule = Schedule::new(&monitor(2, 3), 0, now).knowing(Some(true));
        assert!(schedule.ended(false, now) && schedule.ended(false, now));
        assert!(!schedule.ended(false, now), "the third in a row");
    }

    #[test]
    fn a_row_of_results_turns_a_member_and_a_gap_in_it_does_not() {
        assert_eq!(states(1, 1, "+-+-"), "UDUD");
        assert_eq!(states(2, 3, "+--+---"), "UUUUUUD");
        assert_eq!(states(2, 3, "-+-++"), "DDDDU");
        assert_eq!(states(3, 2, "+--++-+++--"), "UUDDDDDDUUD");
    }

    #[test]
    fn every_interval_a_probe_starts() {
        let start = Instant::now();
        let mut schedule = Schedule::new(&monitor(1, 1), 0, start);
        assert_eq!(schedule.due(), start, "at once");
        for beat in 1..5 {
            let ended = schedule.due() + Duration::from_millis(3);
            schedule.ended(true, ended);
            assert_eq!(schedule.due(), start + INTERVAL * beat);
        }
    }

    #[test]
    fn a_probe_that_outlasts_its_interval_does_not_meet_the_next() {
        let start = Instant::now();
        let mut schedule = Schedule::new(&monitor(1, 1), 0, start);
        schedule.ended(false, start + Duration::from_secs(91));
        assert_eq!(schedule.due(), start + INTERVAL * 4);
        schedule.ended(false, start + INTERVAL * 4 + Duration::from_secs(86_400));
        assert!(schedule.due() > start + INTERVAL * 4 + Duration::from_secs(86_400));
        assert!(schedule.due() <= start + INTERVAL * 5 + Duration::from_secs(86_400));
    }

    #[test]
    fn members_that_start_together_do_not_stay_in_step() {
        let start = Instant::now();
        let seconds: Vec<_> = (0..8)
            .map(|number| {
                let seed = seed(&["msa", &format!("msa{number}")]);
                let mut schedule = Schedule::new(&monitor(1, 1), seed, start);
                schedule.ended(true, start);
                let second = schedule.due();
                assert!(second <= start + INTERVAL && second > start + INTERVAL * 3 / 4);
                schedule.ended(true, second);
                assert_eq!(schedule.due(), second + INTERVAL);
                second
            })
            .collect();
        let mut distinct = seconds.clone();
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), seconds.len());
        assert_ne!(seed(&["a", "bc"]), seed(&["ab", "c"]));
    }
}
