//! Waiting for something to become true, never for time to pass.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(10);

/// Looks until there is something to see.
///
/// # Errors
/// Names what was waited for when `limit` is over.
pub fn wait_for<T>(limit: Duration, what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
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
