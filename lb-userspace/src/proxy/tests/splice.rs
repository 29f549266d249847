//! Chunks between plaintext sides go past the machine, and everything else is as if they had not.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    sync::{
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use super::{
    super::splice::SPLICED,
    peers::{Client, Kind, Lab, Member, PATIENCE, until},
};
use crate::smtp::{end::End, timeouts::Timeouts};

const LARGE: usize = 5_000_001;
/// More than the kernel keeps for two sockets.
const MUCH: usize = 30_000_000;
/// What a member takes of a chunk that it does not take.
const SOME: usize = 1_000_000;

/// Greets, introduces itself and goes on until a chunk; how many octets it has.
fn up_to_chunk(member: &mut Member) -> Option<usize> {
    member.say("220 chunks ESMTP\r\n");
    loop {
        let line = member.line()?;
        if let Some(size) = chunk(&line) {
            return Some(size);
        }
        member.say(match line.starts_with(b"EHLO") {
            true => "250-chunks\r\n250-CHUNKING\r\n250 PIPELINING\r\n",
            false => "250 ok\r\n",
        });
    }
}

fn chunk(line: &[u8]) -> Option<usize> {
    let line = std::str::from_utf8(line).ok()?;
    line.strip_prefix("BDAT ")?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

/// Refuses a chunk that is on its way, and is gone.
fn refuses(member: &mut Member) {
    if up_to_chunk(member).is_some() {
        let _ = member.tcp().read_exact(&mut vec![0; 100_000]);
        // What it has not read makes the end a reset.
        member.say("552 5.3.4 too big\r\n");
    }
}

#[test]
fn a_refusal_is_heard_although_the_connection_broke_behind_it() {
    for kind in [Kind::Plain, Kind::Implicit] {
        let lab = Lab::new(kind, &[refuses]);
        for _ in 0..20 {
            let heard = match kind {
                Kind::Plain => refused(lab.connect()),
                _ => refused(lab.secure(lab.connect())),
            };
            assert!(heard.starts_with("552 5.3.4 "), "{heard}");
        }
    }
}

/// What a client hears that sends a chunk whatever comes.
fn refused<S: Read + Write>(mut client: Client<S>) -> String {
    client.reply();
    client.ask("EHLO c");
    client.send("BDAT 3000000 LAST\r\n");
    let _ = client.stream.write_all(&vec![b'x'; 3_000_000]);
    client.reply()
}

/// Takes every chunk; reports what it read behind the first BDAT, and how the connection ended.
fn takes(member: &mut Member) {
    let (mut seen, mut size) = (Vec::new(), up_to_chunk(member));
    let mut tcp = member.tcp().try_clone().unwrap();
    while let Some(octets) = size {
        let start = seen.len();
        seen.resize(start + octets, 0);
        if tcp.read_exact(&mut seen[start..]).is_err() {
            seen = b"LOST".to_vec();
            break;
        }
        member.say("250 chunk\r\n");
        size = loop {
            let Some(line) = member.line() else {
                break None;
            };
            seen.extend_from_slice(&line);
            if let Some(size) = chunk(&line) {
                break Some(size);
            }
            member.say(match line.as_slice() {
                b"QUIT\r\n" => "221 bye\r\n",
                _ => "250 command\r\n",
            });
        };
    }
    let _ = member.log.send(seen);
}

/// Takes some of the chunk, and nothing more.
fn stops(member: &mut Member) {
    up_to_chunk(member);
    take_some(member);
    pause(PATIENCE);
}

/// Nothing happens for so long.
fn pause(time: Duration) {
    let (_kept, nothing) = mpsc::channel::<()>();
    let _ = nothing.recv_timeout(time);
}

/// Answers when it has seen some of the chunk, and takes the rest all the same; reports whether that came whole.
fn judges_early(member: &mut Member) {
    let size = up_to_chunk(member).unwrap();
    take_some(member);
    member.say("552 5.3.4 too much\r\n");
    let mut rest = member.tcp().take((size - SOME) as u64);
    let taken = std::io::copy(&mut rest, &mut std::io::sink()).unwrap();
    let whole = taken == (size - SOME) as u64 && member.line().as_deref() == Some(b"QUIT\r\n");
    member.say("221 bye\r\n");
    let said = if whole { "WHOLE" } else { "LOST" };
    let _ = member.log.send(said.as_bytes().to_vec());
}

/// As [`stops`], until it may go on; reports how the connection ended.
fn waits(member: &mut Member) {
    up_to_chunk(member);
    take_some(member);
    let _ = member.log.send(Vec::new());
    until("the test", || GO_ON.load(Relaxed));
    let end = std::io::copy(&mut member.tcp(), &mut std::io::sink());
    let end = end.map_or(b"LOST".as_slice(), |_| b"FIN");
    let _ = member.log.send(end.to_vec());
}

static GO_ON: AtomicBool = AtomicBool::new(false);

/// Takes some of the chunk, and dies.
fn dies(member: &mut Member) {
    up_to_chunk(member);
    take_some(member);
    member.die();
}

fn take_some(member: &Member) {
    member.tcp().read_exact(&mut vec![0; SOME]).unwrap();
}

/// Octets without a pattern that a copy or a gap would keep.
fn octets(count: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(count).collect()
}

const BEFORE: &str = "EHLO c\r\n";

/// A client behind MAIL and RCPT.
fn begun(lab: &Lab) -> Client<TcpStream> {
    let mut client = lab.connect();
    client.reply();
    client.expect("EHLO c", "250");
    client.expect("MAIL FROM:<a@b>", "250 ");
    client.expect("RCPT TO:<c@d>", "250 ");
    client
}

const COMMANDS: usize = BEFORE.len() + "MAIL FROM:<a@b>\r\n".len() + "RCPT TO:<c@d>\r\n".len();

/// Sends in a thread of its own, as long as it is taken.
fn sending(client: &Client<TcpStream>, bytes: Vec<u8>) -> JoinHandle<()> {
    let mut stream = client.stream.try_clone().unwrap();
    thread::spawn(move || {
        let _ = stream.write_all(&bytes);
    })
}

fn spliced() -> usize {
    SPLICED.load(Relaxed)
}

#[test]
fn a_chunk_arrives_as_it_was_with_what_follows_in_the_same_write() {
    let before = spliced();
    for (following, replies) in [
        (
            "BDAT 5 LAST\r\nhelloQUIT\r\n",
            "250 chunk\r\n250 chunk\r\n221 bye\r\n",
        ),
        (
            "RSET\r\nQUIT\r\n",
            "250 chunk\r\n250 command\r\n221 bye\r\n",
        ),
        ("QUIT\r\n", "250 chunk\r\n221 bye\r\n"),
    ] {
        let lab = Lab::new(Kind::Plain, &[takes]);
        let mut client = begun(&lab);
        let content = octets(LARGE);
        let command = format!("BDAT {LARGE}\r\n");
        let behind = [&content, following.as_bytes()].concat();
        let writing = sending(&client, [command.as_bytes(), &behind].concat());
        assert_eq!(String::from_utf8(client.rest()).unwrap(), replies);
        writing.join().unwrap();
        assert!(
            lab.seen.recv_timeout(PATIENCE).unwrap() == behind,
            "{following:?}"
        );
        let end = lab.end();
        assert_eq!(end.end, End::Quit);
        let all = (COMMANDS + command.len() + behind.len()) as u64;
        assert_eq!(end.bytes_in, all);
        assert_eq!(lab.cell.session_bytes_in.load(Relaxed), all);
        let member = &lab.pool.members()[0];
        assert_eq!(member.counters().session_bytes_in.load(Relaxed), all);
    }
    // Of each, the beginning was read with the command, and the rest with what follows.
    let spliced = spliced() - before;
    assert!(
        spliced >= 3 * (LARGE - 200_000),
        "{spliced} octets were spliced"
    );
}

#[test]
fn chunks_arrive_as_they_were_however_they_are_cut() {
    let sizes = [1, 65_535, 65_536, 65_537, 0, 131_073, 600_001, 2];
    let mut all = Vec::new();
    for size in sizes {
        all.extend_from_slice(format!("BDAT {size}\r\n").as_bytes());
        all.extend(octets(size));
    }
    all.extend_from_slice(b"BDAT 0 LAST\r\nQUIT\r\n");
    for cuts in [[1, 7, 40_000], [65_536, 1, 3], [70_001, 13, 65_535]] {
        let lab = Lab::new(Kind::Plain, &[takes]);
        let mut client = begun(&lab);
        let (mut stream, whole) = (client.stream.try_clone().unwrap(), all.clone());
        let writing = thread::spawn(move || {
            let mut rest = whole.as_slice();
            for cut in cuts.into_iter().cycle() {
                let (now, later) = rest.split_at(cut.min(rest.len()));
                stream.write_all(now).unwrap();
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
        });
        let replies = String::from_utf8(client.rest()).unwrap();
        let expected = "250 chunk\r\n".repeat(sizes.len() + 1) + "221 bye\r\n";
        assert_eq!(replies, expected, "{cuts:?}");
        writing.join().unwrap();
        let first = "BDAT 1\r\n".len();
        assert!(
            lab.seen.recv_timeout(PATIENCE).unwrap() == all[first..],
            "{cuts:?}"
        );
    }
}

fn impatient(change: impl FnOnce(&mut Timeouts)) -> Timeouts {
    let mut timeouts = Timeouts::DEFAULT;
    change(&mut timeouts);
    timeouts
}

/// The head of a chunk that will not end, and some of it.
fn endless() -> Vec<u8> {
    [b"BDAT 99999999 LAST\r\n".as_slice(), &octets(4_000_000)].concat()
}

#[test]
fn a_member_that_stops_within_a_chunk_stops_the_client_and_is_late() {
    let timeouts = impatient(|it| it.send = Duration::from_millis(300));
    let lab = Lab::with(Kind::Plain, &[stops], timeouts);
    let mut client = begun(&lab);
    let before = spliced();
    let head = b"BDAT 99999999 LAST\r\n".as_slice();
    let writing = sending(&client, [head, &vec![b'x'; MUCH]].concat());
    let reply = client.reply();
    assert!(reply.starts_with("451 4.4.2 "), "{reply}");
    let end = lab.end();
    assert_eq!(end.end, End::SendTimeout);
    assert!(spliced() > before);
    // What it was not handed is not counted.
    let taken = end.bytes_in as usize;
    assert!((SOME..MUCH).contains(&taken), "{taken} octets were taken");
    client.rest();
    writing.join().unwrap();
}

#[test]
fn a_member_that_dies_within_a_chunk_is_a_temporary_failure() {
    let lab = Lab::new(Kind::Plain, &[dies]);
    let mut client = begun(&lab);
    let writing = sending(&client, endless());
    let reply = client.reply();
    assert!(reply.starts_with("451 4.4.2 "), "{reply}");
    assert_eq!(lab.end().end, End::MemberClosed);
    client.rest();
    writing.join().unwrap();
}

#[test]
fn a_member_that_answers_within_a_chunk_gets_the_rest_and_is_heard_once() {
    let lab = Lab::new(Kind::Plain, &[judges_early]);
    let mut client = begun(&lab);
    let command = format!("BDAT {LARGE} LAST\r\n");
    let all = [command.as_bytes(), &octets(LARGE), b"QUIT\r\n"].concat();
    let writing = sending(&client, all);
    let replies = String::from_utf8(client.rest()).unwrap();
    assert_eq!(replies, "552 5.3.4 too much\r\n221 bye\r\n");
    writing.join().unwrap();
    assert_eq!(lab.seen(), "WHOLE");
    assert_eq!(lab.end().end, End::Quit);
}

#[test]
fn a_client_that_leaves_within_a_chunk_leaves_a_member_that_takes_nothing() {
    let lab = Lab::new(Kind::Plain, &[takes]);
    let mut client = begun(&lab);
    sending(&client, endless()).join().unwrap();
    client.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.rest(), b"");
    let end = lab.end();
    assert_eq!(end.end, End::ClientAborted);
    assert_eq!(lab.seen(), "LOST");
    // It took everything else.
    assert_eq!(end.bytes_in, (COMMANDS + endless().len()) as u64);
}

#[test]
fn a_client_that_is_slow_within_a_chunk_is_late() {
    let timeouts = impatient(|it| it.data_block = Duration::from_millis(300));
    let lab = Lab::with(Kind::Plain, &[takes], timeouts);
    let mut client = begun(&lab);
    sending(&client, endless()).join().unwrap();
    let mut stream = client.stream.try_clone().unwrap();
    let dripping = thread::spawn(move || {
        while stream.write_all(b"x").is_ok() {
            pause(Duration::from_millis(20));
        }
    });
    let reply = client.reply();
    assert!(reply.starts_with("421 4.4.2 "), "{reply}");
    assert_eq!(lab.end().end, End::DataTimeout);
    drop(lab);
    dripping.join().unwrap();
}

#[test]
fn what_is_cut_within_a_chunk_is_not_taken_for_a_whole() {
    let mut lab = Lab::new(Kind::Plain, &[waits]);
    let client = begun(&lab);
    let writing = sending(&client, [endless(), vec![b'x'; MUCH]].concat());
    lab.seen();
    let report = lab.proxy.take().unwrap().drain(Duration::from_millis(300));
    assert_eq!((report.finished, report.cut), (0, 1));
    assert_eq!(lab.end().end, End::Cut);
    GO_ON.store(true, Relaxed);
    assert_eq!(lab.seen(), "LOST");
    drop(client);
    writing.join().unwrap();
}
