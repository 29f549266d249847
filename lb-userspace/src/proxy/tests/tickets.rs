//! Tickets travel with the next words, and are not lost where there are none.

use std::{
    io::{ErrorKind, Write as _},
    net::TcpStream,
    time::{Duration, Instant},
};

use rustls::{ClientConnection, HandshakeKind, StreamOwned};

use super::peers::{Client, Kind, Lab, PATIENCE, good, until};
use crate::model::StartTls;

const KIND: Kind = Kind::StartTls(StartTls::Require);

/// A client behind its handshake of TLS 1.3, as soon as its own last flight is out.
fn shaken(lab: &Lab) -> Client<StreamOwned<ClientConnection, TcpStream>> {
    let mut client = lab.connect();
    client.reply();
    client.expect("EHLO c.example", "250");
    client.expect("STARTTLS", "220");
    let mut client = lab.secure_with(client, lab.tls_config_of(&[&rustls::version::TLS13]));
    let StreamOwned { conn, sock } = &mut client.stream;
    while conn.is_handshaking() {
        conn.complete_io(sock).unwrap();
    }
    sock.flush().unwrap();
    client
}

/// Does nothing at all come for this long?
fn is_silent(tcp: &TcpStream, time: Duration) -> bool {
    tcp.set_read_timeout(Some(time)).unwrap();
    let came = tcp.peek(&mut [0]);
    tcp.set_read_timeout(Some(PATIENCE)).unwrap();
    came.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

#[test]
fn a_ticket_comes_with_the_first_reply() {
    let lab = Lab::new(KIND, &[good]);
    // A machine that stands still for a moment sends them one by one.
    until("a ticket to wait for the reply", || {
        let mut client = shaken(&lab);
        let waited = is_silent(&client.stream.sock, Duration::from_millis(50));
        client.expect("EHLO c.example", "250");
        assert!(client.stream.conn.tls13_tickets_received() > 0);
        waited
    });
}

#[test]
fn a_silent_client_gets_its_ticket() {
    let lab = Lab::new(KIND, &[good]);
    let mut client = shaken(&lab);
    assert_eq!(
        client.stream.conn.handshake_kind(),
        Some(HandshakeKind::Full)
    );
    let StreamOwned { conn, sock } = &mut client.stream;
    let began = Instant::now();
    while conn.tls13_tickets_received() == 0 {
        assert!(began.elapsed() < PATIENCE && conn.wants_read());
        conn.read_tls(sock).unwrap();
        conn.process_new_packets().unwrap();
    }
    client.expect("EHLO c.example", "250");
}
