//! Dialogues as mail programs have them, cut anywhere: the same comes of each as of the uncut one.
//!
//! A file of `corpus/dialogues` has a line for each line that is sent: `> ` by the client, `< ` by the member; lines of
//! one side in a row are one read.

use anyhow::{Context as _, Result, ensure};
use lb_userspace::{model::StartTls, smtp::session::ClientSecurity};
use tests::{fuzz, mail::random::Random};

use crate::shell::{Member, Outcome, play};

/// Plays of the short run, and of the long one.
const SHORT: u64 = 4_000;
const LONG: u64 = 100_000;

#[test]
fn random_cuts_of_real_dialogues_change_nothing() -> Result<()> {
    let long = std::env::var_os("SMTPLB_FUZZ_MINUTES").is_some();
    let dialogues: Vec<Dialogue> = fuzz::corpus("dialogues")?
        .iter()
        .map(|text| Dialogue::read(std::str::from_utf8(text)?))
        .collect::<Result<_>>()?;
    let behind: Vec<_> = dialogues.iter().map(Dialogue::behind_starttls).collect();
    let dialogues = [dialogues, behind].concat();
    for (number, dialogue) in dialogues.iter().enumerate() {
        let whole = dialogue.play(&mut |bytes| vec![bytes.to_vec()]);
        ensure!(
            whole.to_member == dialogue.client,
            "dialogue {number} is not passed on as it is"
        );
        ensure!(whole.end.is_some(), "dialogue {number} has no end");
        ensure!(whole.facts.starttls_used == dialogue.starttls);
        let plays = if long { LONG } else { SHORT } / dialogues.len() as u64 + 1;
        for seed in 0..plays {
            let mut random = Random::new(seed);
            let cut = dialogue.play(&mut |bytes| {
                let pieces = fuzz::cut(bytes, &mut random);
                pieces.into_iter().map(<[u8]>::to_vec).collect()
            });
            let same = cut.to_client == whole.to_client
                && cut.to_member == whole.to_member
                && (cut.end, &cut.facts) == (whole.end, &whole.facts);
            ensure!(
                same,
                "dialogue {number}, seed {seed}: {cut:?} in place of {whole:?}"
            );
        }
    }
    Ok(())
}

/// Both sides' words, each with what the other says before it goes on.
#[derive(Clone)]
struct Dialogue {
    /// All that the client says, and the member hears.
    client: Vec<u8>,
    turns: Vec<(Vec<u8>, Vec<u8>)>,
    /// The client goes into TLS behind its first turn.
    starttls: bool,
}

/// A member that answers when it has heard a whole turn.
struct Turns<'a> {
    turns: &'a [(Vec<u8>, Vec<u8>)],
    heard: usize,
    due: usize,
    cut: &'a mut dyn FnMut(&[u8]) -> Vec<Vec<u8>>,
}

impl Dialogue {
    fn read(text: &str) -> Result<Self> {
        let mut turns = vec![(Vec::new(), Vec::new())];
        for line in text.lines() {
            let (who, words) = line
                .split_at_checked(2)
                .context("a line without `> ` or `< `")?;
            let bytes = format!("{words}\r\n");
            let last = turns.last_mut().context("no turn")?;
            match who {
                "< " => last.1.extend_from_slice(bytes.as_bytes()),
                "> " if last.1.is_empty() => last.0.extend_from_slice(bytes.as_bytes()),
                "> " => turns.push((bytes.into_bytes(), Vec::new())),
                _ => anyhow::bail!("{line:?}"),
            }
        }
        Ok(Self::of(turns, false))
    }

    fn of(turns: Vec<(Vec<u8>, Vec<u8>)>, starttls: bool) -> Self {
        Self {
            client: turns.iter().flat_map(|turn| turn.0.clone()).collect(),
            turns,
            starttls,
        }
    }

    /// The same in TLS, which the client has reached by an EHLO and STARTTLS.
    fn behind_starttls(&self) -> Self {
        let mut turns = self.turns.clone();
        let hello = (
            b"EHLO in.clear.example\r\n".to_vec(),
            b"250 hello\r\n".to_vec(),
        );
        turns.insert(1, hello);
        Self::of(turns, true)
    }

    fn play(&self, cut: &mut dyn FnMut(&[u8]) -> Vec<Vec<u8>>) -> Outcome {
        let mut said: Vec<&[u8]> = self.turns[1..].iter().map(|turn| &turn.0[..]).collect();
        if self.starttls {
            said.insert(1, b"STARTTLS\r\n");
        }
        let pieces: Vec<Vec<u8>> = said.into_iter().flat_map(&mut *cut).collect();
        let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
        let mut member = Turns {
            turns: &self.turns,
            heard: 0,
            due: 1,
            cut,
        };
        let security = match self.starttls {
            true => ClientSecurity::StartTls(StartTls::Require),
            false => ClientSecurity::None,
        };
        play(security, &pieces, &mut member, false)
    }
}

impl Member for Turns<'_> {
    fn greet(&mut self) -> Vec<Vec<u8>> {
        (self.cut)(&self.turns[0].1)
    }

    fn hear(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        self.heard += bytes.len();
        let mut answers = Vec::new();
        while let Some(turn) = self.turns.get(self.due) {
            if self.heard < turn.0.len() {
                break;
            }
            self.heard -= turn.0.len();
            self.due += 1;
            answers.extend((self.cut)(&turn.1));
        }
        answers
    }
}
