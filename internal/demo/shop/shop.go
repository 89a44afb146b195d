// Package shop is the demo's application: a bookshop of four small HTTP services
// that know nothing of the mesh. productpage calls details and reviews; reviews
// v2 and v3 call ratings. `isthmus demo shop` runs one of them on a machine.
//
// Every answer names who gave it, so that the demo can count where requests went.
package shop

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"
)

// Names of the services, each a Kubernetes Service on Port.
const (
	ProductPage = "productpage"
	Details     = "details"
	Reviews     = "reviews"
	Ratings     = "ratings"
)

// Port that every service listens on.
const Port = 9080

// Headers of every answer.
const (
	InstanceHeader = "X-Shop-Instance"
	VersionHeader  = "X-Shop-Version"
)

// forwarded are the headers that a service hands on, so that traces connect and
// routes by user work behind the first hop.
var forwarded = []string{"X-Request-Id", "Traceparent", "Tracestate", "B3", "End-User", "User-Agent"}

// Options of one service.
type Options struct {
	Service  string
	Version  string // v1, v2, v3; of reviews it decides what is shown
	Instance string // usually the host's name
	// FailFile makes the service answer 503 while a file of that name exists.
	FailFile string
	// URL gives the base URL of another service; nil is http://NAME:9080.
	URL func(service string) string
}

// Review of a book. Stars is 0 where ratings were not asked (v1).
type Review struct {
	Reviewer string `json:"reviewer"`
	Text     string `json:"text"`
	Stars    int    `json:"stars,omitempty"`
	Color    string `json:"color,omitempty"`
}

// BookReviews is what reviews answers.
type BookReviews struct {
	Instance string   `json:"instance"`
	Version  string   `json:"version"`
	Error    string   `json:"error,omitempty"` // ratings could not be had
	Reviews  []Review `json:"reviews"`
}

// BookDetails is what details answers.
type BookDetails struct {
	Title     string `json:"title"`
	Author    string `json:"author"`
	Year      int    `json:"year"`
	Pages     int    `json:"pages"`
	Publisher string `json:"publisher"`
	Instance  string `json:"instance"`
}

// BookRatings is what ratings answers: stars by reviewer.
type BookRatings struct {
	Instance string         `json:"instance"`
	Stars    map[string]int `json:"stars"`
}

type service struct {
	Options
	client *http.Client
}

// Handler serves one of the services.
func Handler(o Options) (http.Handler, error) {
	s := &service{Options: o, client: &http.Client{Timeout: 10 * time.Second}}
	if s.URL == nil {
		s.URL = func(name string) string { return fmt.Sprintf("http://%s:%d", name, Port) }
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	switch o.Service {
	case ProductPage:
		mux.HandleFunc("GET /{$}", s.page)
	case Details:
		mux.HandleFunc("GET /details", s.details)
	case Reviews:
		mux.HandleFunc("GET /reviews", s.reviews)
	case Ratings:
		mux.HandleFunc("GET /ratings", s.ratings)
	default:
		return nil, fmt.Errorf("no service %q: the shop has %s, %s, %s and %s", o.Service, ProductPage, Details, Reviews, Ratings)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set(InstanceHeader, o.Instance)
		w.Header().Set(VersionHeader, o.Version)
		if _, err := os.Stat(o.FailFile); o.FailFile != "" && err == nil {
			http.Error(w, "out of order", http.StatusServiceUnavailable)
			return
		}
		mux.ServeHTTP(w, r)
	}), nil
}

// get asks another service and decodes its JSON.
func (s *service) get(r *http.Request, name, path string, into any) error {
	ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URL(name)+path, nil)
	if err != nil {
		return err
	}
	for _, h := range forwarded {
		if v := r.Header.Get(h); v != "" {
			req.Header.Set(h, v)
		}
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 200))
		return fmt.Errorf("%s answered %s: %s", name, resp.Status, body)
	}
	return json.NewDecoder(resp.Body).Decode(into)
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}

func (s *service) details(w http.ResponseWriter, _ *http.Request) {
	answer(w, BookDetails{Title: "The Comedy of Errors", Author: "William Shakespeare", Year: 1595, Pages: 200,
		Publisher: "First Folio", Instance: s.Instance})
}

func (s *service) ratings(w http.ResponseWriter, _ *http.Request) {
	answer(w, BookRatings{Instance: s.Instance, Stars: map[string]int{"Adriana": 5, "Dromio": 4}})
}

func (s *service) reviews(w http.ResponseWriter, r *http.Request) {
	out := BookReviews{Instance: s.Instance, Version: s.Version, Reviews: []Review{
		{Reviewer: "Adriana", Text: "Two pairs of twins, one town, and nobody asks twice."},
		{Reviewer: "Dromio", Text: "Beaten by both masters. Would run errands again."},
	}}
	if color := map[string]string{"v2": "black", "v3": "red"}[s.Version]; color != "" {
		var ratings BookRatings
		if err := s.get(r, Ratings, "/ratings", &ratings); err != nil {
			out.Error = err.Error()
		}
		for i := range out.Reviews {
			out.Reviews[i].Stars = ratings.Stars[out.Reviews[i].Reviewer]
			out.Reviews[i].Color = color
		}
	}
	answer(w, out)
}
