package shop

import (
	"html/template"
	"net/http"
	"strings"
)

var page = template.Must(template.New("page").Funcs(template.FuncMap{
	"stars": func(n int) string { return strings.Repeat("★", n) + strings.Repeat("☆", 5-n) },
}).Parse(`<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{with .Details}}{{.Title}}{{else}}The shop{{end}}</title>
<style>
body { font: 17px/1.5 Georgia, serif; max-width: 42rem; margin: 3rem auto; padding: 0 1rem; color: #222 }
h1 { margin-bottom: 0 } .by { color: #666; margin-top: 0 }
blockquote { margin: 1.2rem 0; padding-left: 1rem; border-left: 3px solid #ddd }
footer, .error { font: 14px/1.5 ui-monospace, monospace; color: #666 } .error { color: #b00 }
</style>
{{with .Details}}<h1>{{.Title}}</h1><p class="by">{{.Author}}, {{.Year}} · {{.Pages}} pages · {{.Publisher}}</p>{{end}}
{{with .DetailsError}}<p class="error">Details are not available: {{.}}</p>{{end}}
{{with .Reviews}}{{range .Reviews}}<blockquote>{{.Text}}<br>— {{.Reviewer}}
{{if .Stars}}<span style="color:{{.Color}}">{{stars .Stars}}</span>{{end}}</blockquote>{{end}}
{{with .Error}}<p class="error">Ratings are not available: {{.}}</p>{{end}}{{end}}
{{with .ReviewsError}}<p class="error">Reviews are not available: {{.}}</p>{{end}}
<footer>page by {{.Instance}}{{with .Details}} · details by {{.Instance}}{{end}}{{with .Reviews}} · reviews {{.Version}} by {{.Instance}}{{end}}</footer>
`))

type pageData struct {
	Instance                   string
	Details                    *BookDetails
	Reviews                    *BookReviews
	DetailsError, ReviewsError string
}

// page answers JSON to who asks for it, else HTML. Its status is 200 only if all
// that it shows could be had, so that a failed call behind it can't hide.
func (s *service) page(w http.ResponseWriter, r *http.Request) {
	d := pageData{Instance: s.Instance}
	var details BookDetails
	if err := s.get(r, Details, "/details", &details); err != nil {
		d.DetailsError = err.Error()
	} else {
		d.Details = &details
	}
	var reviews BookReviews
	if err := s.get(r, Reviews, "/reviews", &reviews); err != nil {
		d.ReviewsError = err.Error()
	} else {
		d.Reviews = &reviews
		w.Header().Set("X-Shop-Reviews-Version", reviews.Version)
		w.Header().Set("X-Shop-Reviews-Instance", reviews.Instance)
	}
	status := http.StatusOK
	if d.DetailsError != "" || d.ReviewsError != "" || reviews.Error != "" {
		status = http.StatusBadGateway
	}
	if strings.Contains(r.Header.Get("Accept"), "application/json") {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		answer(w, d)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(status)
	_ = page.Execute(w, d)
}
