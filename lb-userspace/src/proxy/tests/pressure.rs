//! A reader that stops stops the writer: what is held between them is bounded, both ways.
//!
//! What left one end and did not reach the other lies in the queues of four sockets, which the kernel tells, or here.

use std::{
    fs,
    io::{ErrorKind, Write as _},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use super::{
    members::IMPLICIT,
    peers::{Client, Kind, Lab, Member, PATIENCE, Setup, TlsClient, until},
};
use crate::model::Sessions;

/// Most that one session may hold in plaintext, in bytes: what was read at once, and the queues of both directions.
const HELD: u64 = 256 * 1024;
/// Of content in TLS on both sides: what was read at once and ahead, and what TLS towards the member has not sent.
const HELD_CONTENT: u64 = (64 + 80 + 48) * 1024;
/// Of replies: a record, a reply in the making, the client's queue, and what TLS towards it has not sent.
const HELD_REPLIES: u64 = (20 + 32 + 40 + 16) * 1024;
/// Nothing has moved for so long: nothing will.
const STILL: Duration = Duration::from_millis(300);

/// Clients may name recipients as long as they like.
pub(super) fn endless_lists() -> Sessions {
    Sessions {
        max_recipients: 0,
        ..Sessions::default()
    }
}

/// Bytes in the send and receive queues of every established socket with one of these ports.
fn queued(ports: [u16; 2]) -> u64 {
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
    let port = |end: &str| hex(end.split_once(':').unwrap().1) as u16;
    let sums = table.lines().skip(1).filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ours = ports.contains(&port(words[1])) || ports.contains(&port(words[2]));
        let (sent, received) = words[4].split_once(':')?;
        (ours && words[3] == "01").then(|| hex(sent) + hex(received))
    });
    sums.sum()
}

/// Small queues at this end: what the kernel takes would only take time.
fn narrow(stream: &std::net::TcpStream) {
    let socket = socket2::SockRef::from(stream);
    socket.set_recv_buffer_size(16 * 1024).unwrap();
    socket.set_send_buffer_size(16 * 1024).unwrap();
}

/// Writes the same bytes over and over until nothing is taken any more; how many were.
fn push(client: &mut Client<std::net::TcpStream>, bytes: &[u8]) -> u64 {
    client.stream.set_nonblocking(true).unwrap();
    let (mut written, mut last) = (0, Instant::now());
    until("the writer to be stopped", || {
        let from = (written % bytes.len() as u64) as usize;
        match client.stream.write(&bytes[from..]) {
            Ok(count) => (written, last) = (written + count as u64, Instant::now()),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        last.elapsed() >= STILL
    });
    client.stream.set_nonblocking(false).unwrap();
    written
}

/// Makes a member's queues small and says which port it sees.
fn tell_port(member: &mut Member) {
    narrow(member.tcp());
    let port = member.tcp().peer_addr().unwrap().port();
    let _ = member.log.send(port.to_be_bytes().to_vec());
}

fn ports(lab: &Lab, client: &std::net::TcpStream) -> [u16; 2] {
    let told = lab.seen.recv_timeout(PATIENCE).unwrap();
    let own = client.local_addr().unwrap().port();
    [own, u16::from_be_bytes([told[0], told[1]])]
}

/// The member below may go.
static MEASURED: AtomicBool = AtomicBool::new(false);

fn stops_reading(member: &mut Member) {
    tell_port(member);
    take_and_stop(member);
}

fn take_and_stop(member: &mut Member) {
    member.say("220 slow\r\n");
    while member.line().is_some_and(|line| line != b"DATA\r\n") {
        member.say("250 ok\r\n");
    }
    member.say("354 go\r\n");
    until("the test to end", || MEASURED.load(Relaxed));
}

#[test]
fn a_member_that_stops_reading_stops_the_client() {
    let lab = Lab::new(Kind::Plain, &[stops_reading]);
    let mut client = lab.connect();
    narrow(&client.stream);
    client.reply();
    client.expect("MAIL FROM:<a@b>", "250 ");
    client.expect("RCPT TO:<c@d>", "250 ");
    client.expect("DATA", "354 ");
    let ports = ports(&lab, &client.stream);
    let written = push(&mut client, &content());
    let held = written.checked_sub(queued(ports)).unwrap();
    assert!(held < HELD, "{held} of {written} bytes are held");
    assert!(
        written > HELD,
        "nothing stopped the writer: {written} bytes"
    );
}

fn content() -> Vec<u8> {
    [[b'x'; 62].as_slice(), b"\r\n"].concat().repeat(256)
}

/// What the member below said and heard.
static TALKED: AtomicU64 = AtomicU64::new(0);
static HEARD: AtomicU64 = AtomicU64::new(0);

/// Answers every line at length.
fn talks_on(member: &mut Member) {
    tell_port(member);
    member.say("220 talks\r\n");
    let reply = format!("250 {}\r\n", "x".repeat(1900));
    while let Some(line) = member.line() {
        HEARD.fetch_add(line.len() as u64, Relaxed);
        let mut rest = reply.as_bytes();
        while !rest.is_empty() {
            let Ok(count) = member.tcp().write(rest) else {
                return;
            };
            TALKED.fetch_add(count as u64, Relaxed);
            rest = &rest[count..];
        }
    }
}

#[test]
fn a_client_that_stops_reading_stops_the_member() {
    let setup = Setup {
        sessions: endless_lists(),
        ..Setup::default()
    };
    let lab = Lab::made(setup, &[talks_on]);
    let mut client = lab.connect();
    narrow(&client.stream);
    client.reply();
    let ports = ports(&lab, &client.stream);
    let asked = push(&mut client, &b"RCPT TO:<a@b>\r\n".repeat(256));
    let moved = asked + TALKED.load(Relaxed) - HEARD.load(Relaxed);
    let held = moved.checked_sub(queued(ports)).unwrap();
    assert!(held < HELD, "{held} of {moved} bytes are held");
    assert!(TALKED.load(Relaxed) > HELD, "nothing stopped the member");
}

/// TLS from the first byte on both sides.
fn secured(members: &[fn(&mut Member)]) -> (Lab, TlsClient) {
    let setup = Setup {
        kind: Kind::Implicit,
        server: IMPLICIT,
        sessions: endless_lists(),
        ..Setup::default()
    };
    let lab = Lab::made(setup, members);
    let mut client = lab.secure(lab.connect());
    narrow(&client.stream.sock);
    client.reply();
    (lab, client)
}

/// As [`push`], in records of these bytes; how many bytes of TLS were taken.
fn push_records(client: &mut TlsClient, record: &[u8]) -> u64 {
    let stream = &mut client.stream;
    stream.sock.set_nonblocking(true).unwrap();
    let (mut written, mut last) = (0, Instant::now());
    until("the writer to be stopped", || {
        if !stream.conn.wants_write() {
            stream.conn.writer().write_all(record).unwrap();
        }
        match stream.conn.write_tls(&mut stream.sock) {
            Ok(count) => (written, last) = (written + count as u64, Instant::now()),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        last.elapsed() >= STILL
    });
    written
}

fn stops_reading_in_tls(member: &mut Member) {
    tell_port(member);
    assert!(member.secure());
    take_and_stop(member);
}

#[test]
fn a_member_in_tls_that_stops_reading_stops_the_client() {
    let (lab, mut client) = secured(&[stops_reading_in_tls]);
    client.expect("MAIL FROM:<a@b>", "250 ");
    client.expect("RCPT TO:<c@d>", "250 ");
    client.expect("DATA", "354 ");
    let ports = ports(&lab, &client.stream.sock);
    let written = push_records(&mut client, &content());
    // Records of the session's own making count as held less than they are: 22 bytes of each.
    let held = written.saturating_sub(queued(ports));
    assert!(held < HELD_CONTENT, "{held} of {written} bytes are held");
    assert!(
        written > HELD_CONTENT,
        "nothing stopped the writer: {written} bytes"
    );
}

/// What the member below said and heard.
static TALKED_IN_TLS: AtomicU64 = AtomicU64::new(0);
static HEARD_IN_TLS: AtomicU64 = AtomicU64::new(0);

/// What TLS 1.3 adds to a record: header, type and tag (RFC 8446 §5.2).
const RECORD: u64 = 5 + 1 + 16;

fn talks_on_in_tls(member: &mut Member) {
    tell_port(member);
    assert!(member.secure());
    member.say("220 talks\r\n");
    let reply = format!("250 {}\r\n", "x".repeat(1900));
    while let Some(line) = member.line() {
        HEARD_IN_TLS.fetch_add(line.len() as u64, Relaxed);
        if !member.say(&reply) {
            return;
        }
        TALKED_IN_TLS.fetch_add(RECORD + reply.len() as u64, Relaxed);
    }
}

#[test]
fn a_client_in_tls_that_stops_reading_stops_the_member() {
    let (lab, mut client) = secured(&[talks_on_in_tls]);
    let ports = ports(&lab, &client.stream.sock);
    let asked = push_records(&mut client, &b"RCPT TO:<a@b>\r\n".repeat(256));
    let moved = asked + TALKED_IN_TLS.load(Relaxed) - HEARD_IN_TLS.load(Relaxed);
    let held = moved.saturating_sub(queued(ports));
    let most = HELD_CONTENT + HELD_REPLIES;
    assert!(held < most, "{held} of {moved} bytes are held");
    let talked = TALKED_IN_TLS.load(Relaxed);
    assert!(talked > most, "nothing stopped the member: {talked} bytes");
}
