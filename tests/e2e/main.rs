//! Clients, the box and members in namespaces.

mod the_lab;
