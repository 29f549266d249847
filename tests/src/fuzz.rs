//! Hostile bytes by dice: inputs of a corpus, changed at random, for whoever wants to check what becomes of them.
//!
//! No tool of its own and no instrumentation: an input that makes the target behave as none did before (its *signature*)
//! is kept and changed further. The short run is the same every time. `SMTPLB_FUZZ_MINUTES` makes it long, with a new
//! seed that is printed; `SMTPLB_FUZZ_SEED` chooses it.

use std::{
    collections::HashSet,
    env, fs,
    hash::{DefaultHasher, Hash, Hasher},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};

use crate::mail::random::Random;

/// Inputs of the short run.
const SHORT: u64 = 20_000;
/// Longest input made, in octets: beyond every bound of a line or a header.
const LONGEST: usize = 20_000;
/// Inputs kept for their signatures.
const KEPT: usize = 4096;

/// What a target did with an input, in a number: equal for equal behaviour.
pub type Signature = u64;

/// The signature of anything.
pub fn signature(of: impl Hash) -> Signature {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// Checks every input of the corpus of this name and many that are made of them. `dictionary`: what inputs consist of.
///
/// # Errors
/// When there is no corpus. A check that panics is reported with its input, and panics on.
pub fn run(
    name: &str,
    dictionary: &[&[u8]],
    check: impl Fn(&[u8], &mut Random) -> Signature,
) -> Result<()> {
    let minutes: Option<u64> = env::var("SMTPLB_FUZZ_MINUTES")
        .ok()
        .and_then(|it| it.parse().ok());
    let seed = seed(minutes.is_some());
    println!("{name}: seed {seed}");
    let mut random = Random::new(seed);
    let mut pool = corpus(name)?;
    let mut seen = HashSet::new();
    let mut checked = 0_u64;
    let mut one = |input: &[u8], random: &mut Random| {
        checked += 1;
        let outcome = catch_unwind(AssertUnwindSafe(|| check(input, random)));
        outcome.unwrap_or_else(|panic| {
            let kept = keep(name, "finding", input);
            eprintln!(
                "{name}: input {checked} of seed {seed} is {}",
                kept.display()
            );
            resume_unwind(panic)
        })
    };
    for input in &pool {
        seen.insert(one(input, &mut random));
    }
    let end = minutes.map(|minutes| Instant::now() + Duration::from_secs(60 * minutes));
    let mut made = 0;
    while end.map_or(made < SHORT, |end| Instant::now() < end) {
        made += 1;
        let input = change(&pool, dictionary, &mut random);
        if seen.insert(one(&input, &mut random)) && pool.len() < KEPT {
            if end.is_some() && input.len() < 512 {
                keep(name, "new", &input);
            }
            pool.push(input);
        }
    }
    println!("{name}: {checked} inputs, {} signatures", seen.len());
    Ok(())
}

fn seed(long: bool) -> u64 {
    let given = env::var("SMTPLB_FUZZ_SEED")
        .ok()
        .and_then(|it| it.parse().ok());
    let now = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(1, |now| now.as_secs())
    };
    given.unwrap_or_else(|| if long { now() } else { 1 })
}

/// The committed inputs of a target.
///
/// # Errors
/// When there are none.
pub fn corpus(name: &str) -> Result<Vec<Vec<u8>>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(name);
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)
        .with_context(|| format!("no corpus in {}", folder.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    files.sort();
    ensure!(
        !files.is_empty(),
        "the corpus in {} is empty",
        folder.display()
    );
    files.iter().map(|file| Ok(fs::read(file)?)).collect()
}

/// Writes an input down where builds are, for a person to look at.
fn keep(name: &str, kind: &str, input: &[u8]) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../target/fuzz")
        .join(name);
    let path = folder.join(format!("{kind}-{:016x}", signature(input)));
    // A full disk must not hide what was found.
    let _ = fs::create_dir_all(&folder).and_then(|()| fs::write(&path, input));
    path
}

/// Another input, made of one or two that there are.
fn change(pool: &[Vec<u8>], dictionary: &[&[u8]], random: &mut Random) -> Vec<u8> {
    let mut input = pool[random.below(pool.len())].clone();
    for _ in 0..=random.below(6) {
        let at = random.below(input.len() + 1);
        let to = at + random.below(input.len() - at + 1);
        match random.below(8) {
            0 if !input.is_empty() => {
                let at = at.min(input.len() - 1);
                input[at] ^= 1 << random.below(8);
            }
            1 => insert(&mut input, at, &[random.below(256) as u8]),
            2 | 3 => insert(&mut input, at, dictionary[random.below(dictionary.len())]),
            4 => _ = input.drain(at..to),
            5 => {
                let part = input[at..to].to_vec();
                insert(&mut input, at, &part);
            }
            6 => {
                let other = &pool[random.below(pool.len())];
                input.truncate(at);
                input.extend_from_slice(&other[random.below(other.len() + 1)..]);
            }
            // Beyond every bound, now and then.
            7 if random.below(16) == 0 => {
                let token = dictionary[random.below(dictionary.len())];
                insert(&mut input, at, &token.repeat(1 + random.below(3000)));
            }
            _ => {}
        }
        input.truncate(LONGEST);
    }
    input
}

fn insert(input: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    input.splice(at..at, bytes.iter().copied());
}

/// The bytes in random pieces, none of them empty.
pub fn cut<'a>(mut bytes: &'a [u8], random: &mut Random) -> Vec<&'a [u8]> {
    let mut pieces = Vec::new();
    while !bytes.is_empty() {
        let (piece, rest) = bytes.split_at(1 + random.below(bytes.len().min(40)));
        pieces.push(piece);
        bytes = rest;
    }
    pieces
}
