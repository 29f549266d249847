//! Waiting for something to become true, never for time to pass.

use std::{
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(10);

/// How many times longer than on a machine of its own everything may take: `SMTPLB_PATIENCE`, 1 without it. An emulated
/// machine is 10 to 25 times slower.
pub fn patience() -> u32 {
    static PATIENCE: OnceLock<u32> = OnceLock::new();
    *PATIENCE.get_or_init(|| {
        let said = std::env::var("SMTPLB_PATIENCE").ok();
        said.and_then(|said| said.parse().ok())
            .map_or(1, |said: u32| said.clamp(1, 1000))
    })
}

/// Looks until there is something to see.
///
/// # Errors
/// Names what was waited for when `limit` is over, stretched by [`patience`].
pub fn wait_for<T>(limit: Duration, what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let limit = limit.saturating_mul(patience());
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            bail!("waited {} s in vain for {what}", limit.as_secs_f32());
        }
        pause(PAUSE);
    }
}

/// Looks until it is true.
///
/// # Errors
/// As [`wait_for`].
pub fn wait_until(limit: Duration, what: &str, mut look: impl FnMut() -> bool) -> Result<()> {
    wait_for(limit, what, || look().then_some(()))
}

/// Lets time pass where time itself is the subject, as in a rate or between two looks.
pub fn pause(time: Duration) {
    let until = Instant::now() + time;
    while let Some(rest) = until.checked_duration_since(Instant::now()) {
        thread::park_timeout(rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sees_what_comes_later() {
        let mut looks = 0;
        wait_until(Duration::from_secs(5), "the third look", || {
            looks += 1;
            looks == 3
        })
        .unwrap();
    }

    #[test]
    fn says_what_it_waited_for() {
        let error = wait_until(Duration::ZERO, "a miracle", || false).unwrap_err();
        assert_eq!(error.to_string(), "waited 0 s in vain for a miracle");
    }
}
