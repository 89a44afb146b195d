// Package architecture keeps the rules of docs/architecture.md by tests: who may
// import whom, that every package says what it is for, and that the pages list
// what there is. Nothing imports it.
package architecture
