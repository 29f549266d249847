//! Lines for whoever reads the daemon's output, written by a thread of their own: a reader that stands still must not
//! hold up anything else.

use std::{
    fmt::Display,
    fs::File,
    io::{self, Write},
    os::fd::AsFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// Bytes that wait for the reader: more than the flow log takes out of its ring buffer in one look.
const MOST: usize = 8 << 20;
/// Between two words about what was left out.
const PERIOD: Duration = Duration::from_secs(1);
/// How long a line may wait for others: a busy box writes a hundred times a second, not with every session.
const GATHER: Duration = Duration::from_millis(10);

/// A handle to the writer of one stream; lines come out whole, and in the order they were given.
#[derive(Debug, Clone)]
pub struct Lines(Arc<Queue>);

#[derive(Debug)]
struct Queue {
    most: usize,
    period: Duration,
    gather: Duration,
    state: Mutex<State>,
    /// There is something to write.
    filled: Condvar,
    /// Everything is written.
    emptied: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    /// The writer has seen lines and is not done with them; it looks for more by itself.
    writing: bool,
    /// Lines that found no place, and of them those that the reader was not told of yet.
    left_out: u64,
    untold: u64,
}

impl Lines {
    /// Starts the writer of a stream; it lives as long as the process.
    ///
    /// # Errors
    ///
    /// When there is no descriptor or no thread for it.
    pub fn start(out: impl AsFd) -> io::Result<Self> {
        // Beside the library's own handle: who ends the process must not wait for its lock.
        let out = File::from(out.as_fd().try_clone_to_owned()?);
        Self::with(MOST, PERIOD, GATHER, out)
    }

    fn with(
        most: usize,
        period: Duration,
        gather: Duration,
        out: impl Write + Send + 'static,
    ) -> io::Result<Self> {
        let queue = Arc::new(Queue {
            most,
            period,
            gather,
            state: Mutex::default(),
            filled: Condvar::new(),
            emptied: Condvar::new(),
        });
        let writer = queue.clone();
        thread::Builder::new()
            .name("lines".to_owned())
            .spawn(move || writer.write_out(out))?;
        Ok(Self(queue))
    }

    /// Hands a line over, without its end; never waits for the reader. One that finds no place is left out and counted.
    pub fn say(&self, line: impl Display) {
        self.push(format!("{line}\n").as_bytes());
    }

    fn push(&self, line: &[u8]) {
        let mut state = self.0.lock();
        if state.waiting.len() + line.len() > self.0.most {
            state.left_out += 1;
            state.untold += 1;
            return;
        }
        state.waiting.extend_from_slice(line);
        if !state.writing {
            self.0.filled.notify_one();
        }
    }

    /// How many lines were left out, ever.
    pub fn left_out(&self) -> u64 {
        self.0.lock().left_out
    }

    /// Waits until everything is written, `limit` at most: for the end of the process.
    pub fn finish(&self, limit: Duration) {
        self.0.filled.notify_one();
        let pending = |state: &mut State| state.writing || !state.waiting.is_empty();
        drop(
            self.0
                .emptied
                .wait_timeout_while(self.0.lock(), limit, pending),
        );
    }
}

/// For whoever writes whole lines at once.
impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Queue {
    /// A panic elsewhere must not silence everybody.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_out(&self, mut out: impl Write) {
        let mut told: Option<Instant> = None;
        loop {
            let mut state = self.lock();
            state.writing = false;
            if state.waiting.is_empty() {
                self.emptied.notify_all();
            }
            let left_out = loop {
                let wait = told.map_or(Duration::ZERO, |told| {
                    self.period.saturating_sub(told.elapsed())
                });
                match (state.untold, wait) {
                    (1.., Duration::ZERO) => break std::mem::take(&mut state.untold),
                    _ if !state.waiting.is_empty() => break 0,
                    (0, _) => {
                        state = self
                            .filled
                            .wait(state)
                            .unwrap_or_else(PoisonError::into_inner);
                    }
                    (_, wait) => {
                        let waited = self.filled.wait_timeout(state, wait);
                        state = waited.unwrap_or_else(PoisonError::into_inner).0;
                    }
                }
            };
            state.writing = true;
            if left_out == 0 && state.waiting.len() < self.most / 2 {
                // Woken sooner only by who waits for the end.
                let gathered = self.filled.wait_timeout(state, self.gather);
                state = gathered.unwrap_or_else(PoisonError::into_inner).0;
            }
            let mut lines = std::mem::take(&mut state.waiting);
            drop(state);
            if left_out > 0 {
                let word =
                    format!("{left_out} lines were left out here: they were not read in time\n");
                lines.extend_from_slice(word.as_bytes());
                told = Some(Instant::now());
            }
            // A reader that went away is no reason to end.
            let _ = out.write_all(&lines).and_then(|()| out.flush());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// A reader that takes what is written when it is asked to.
    struct Slow {
        begun: mpsc::Sender<Vec<u8>>,
        go_on: mpsc::Receiver<()>,
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.begun.send(bytes.to_vec());
            let _ = self.go_on.recv();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn slow(period: Duration) -> (Lines, impl Fn() -> String, mpsc::Sender<()>) {
        let (begun, written) = mpsc::channel();
        let (let_on, go_on) = mpsc::channel();
        let lines = Lines::with(8, period, Duration::ZERO, Slow { begun, go_on }).unwrap();
        let next = move || String::from_utf8(written.recv_timeout(PATIENCE).unwrap()).unwrap();
        (lines, next, let_on)
    }

    #[test]
    fn a_reader_that_stands_still_holds_nobody_up_and_learns_what_it_missed() {
        const MISSED: &str = "2 lines were left out here: they were not read in time\n";
        for (period, later) in [(Duration::ZERO, MISSED), (Duration::MAX, "")] {
            let (lines, next, let_on) = slow(period);
            lines.say("one");
            assert_eq!(next(), "one\n");
            for word in ["two", "six", "lost", "ten"] {
                lines.say(word);
            }
            assert_eq!(lines.left_out(), 2);
            let_on.send(()).unwrap();
            assert_eq!(next(), format!("two\nsix\n{MISSED}"));
            for word in ["four", "five", "nine"] {
                lines.say(word);
            }
            let_on.send(()).unwrap();
            assert_eq!(next(), format!("four\n{later}"), "told once in a period");
            let_on.send(()).unwrap();
            lines.finish(PATIENCE);
            assert_eq!(lines.left_out(), 4);
        }
    }

    #[test]
    fn lines_that_come_together_are_written_together() {
        let (begun, written) = mpsc::channel();
        let (let_on, go_on) = mpsc::channel();
        // Longer than handing over two lines can take; it is waited for once.
        let gather = Duration::from_millis(500);
        let lines = Lines::with(MOST, PERIOD, gather, Slow { begun, go_on }).unwrap();
        let_on.send(()).unwrap();
        lines.say("one");
        lines.say("two");
        assert_eq!(written.recv_timeout(PATIENCE).unwrap(), b"one\ntwo\n");
        lines.finish(PATIENCE);
    }

    #[test]
    fn the_end_waits_for_the_last_line() {
        let (lines, next, let_on) = slow(PERIOD);
        lines.say("last");
        let other = lines.clone();
        let end = thread::spawn(move || other.finish(PATIENCE));
        assert_eq!(next(), "last\n");
        assert!(!end.is_finished());
        let_on.send(()).unwrap();
        end.join().unwrap();
        assert!(!lines.0.lock().writing);
    }

    #[test]
    fn a_reader_that_went_away_ends_nothing() {
        struct Gone;
        impl Write for Gone {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let lines = Lines::with(MOST, PERIOD, GATHER, Gone).unwrap();
        for _ in 0..2 {
            lines.say("into the void");
            lines.finish(PATIENCE);
            assert!(lines.0.lock().waiting.is_empty());
        }
    }
}
